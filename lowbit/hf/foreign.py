"""Quantized checkpoints on their way into lowbit's layers: which weights of the model they hold, and how tensors of
another layout than that of compressed-tensors are converted while transformers loads them.

Every tensor of GPTQ and AWQ is one of compressed-tensors, laid out differently. So each has a conversion of its own,
and where transformers merges experts, it runs in front of the merge.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import ConversionOps, WeightConverter

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.decoded import decoded
from lowbit.checkpoint.extras import judge
from lowbit.discovery import CheckpointNames, Site, find_sites, known_as
from lowbit.errors import InputError
from lowbit.folders.stored import StoredWeight, StoredWeights
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.packed import QuantizedSite, is_of_packed
from lowbit.layers.experts import packed_name
from lowbit.transformers_api import merges_matrices

# How the names of tensors end that a layer has no parameter for where they carry nothing
_IDLE = ("_zero_point", "_g_idx")


class StoredModel:
    """sites: parameter -> QuantizedSite of what the checkpoint in `files` holds quantized, a folder or the weight files
    of one.

    Raises InputError for a checkpoint that is damaged or does not belong to `model`.
    """

    # Stored weights load as they are: nothing is computed, and what is damaged is found in the packed tensors
    damaged: Sequence[str] = ()
    computed_from: Sequence[str] = ()

    def __init__(self, model: nn.Module, names: CheckpointNames, files: Path | Sequence[str | Path]):
        self.names = names
        sites = find_sites(model)
        reader = CheckpointReader(files) if isinstance(files, Path) else CheckpointReader(Path(files[0]).parent, files)
        self.stored = StoredWeights(decoded(reader), known_as(names, sites))
        # transformers drops what is called like the tensors that have no place here (`idle`), whatever it holds
        alike = [info.name for info in self.stored.plain if info.name.endswith(_IDLE)]
        for name, reason in judge(reader, alike)[1].items():
            raise InputError(f"{name} is unknown to the model: {reason}")
        # in the order of the model, which is that of the parameters of experts when they are dense again
        several = self._by_parameter(sites)
        self.sites = {name: _combined(site, several[name]) for name, site in sites.items() if name in several}
        for name, found in self.sites.items():
            if found.site.kind == "experts" and found.scheme.activations is not None:
                raise InputError(
                    f"{name} is {found.scheme.name}: of experts lowbit runs weight-only schemes, W<bits>A16"
                )
        # suffixes of tensors that are laid out otherwise -> those that they become
        self._converted: dict[str, str] = {}
        for weight in self.stored.weights.values():
            self._converted |= self.stored.config.converted(weight.tensors, weight.scheme, weight.shape)

        # full names of packed parameters -> what they belong to
        self.owner = {packed: found for found in self.sites.values() for packed in _packed_names(found.site)}

    def merged(self, found: QuantizedSite) -> int:
        """How many stored weights lie side by side in one matrix: 2 for the gate and up of an expert."""
        return self.names.merged(found.site.parameter) if found.site.kind == "experts" else 1

    def part(self, found: QuantizedSite) -> tuple[int, int]:
        """(out_features, in_features) of one stored weight."""
        return found.site.out_features // self.merged(found), found.site.in_features

    def _by_parameter(self, sites: dict[str, Site]) -> dict[str, list[StoredWeight]]:
        """Stored weights by the parameter that they are part of. That of experts may be called `weight` or anything."""
        found = defaultdict(list)
        for base, weight in self.stored.weights.items():
            for name in (base, f"{base}.weight") if weight.experts else (f"{base}.weight",):
                parameter, _ = self.names.locate(name)
                if parameter in sites:
                    found[parameter].append(weight)
                    break
        return found

    @property
    def tensors(self) -> list[tuple[str, int]]:
        """(name, number of dimensions) of what is stored, a quantized weight as one matrix."""
        stored = self.stored
        matrices = [(base if w.experts else f"{base}.weight", 2) for base, w in stored.weights.items()]
        return matrices + [(info.name, len(info.shape)) for info in stored.plain]

    @property
    def idle(self) -> list[str]:
        """Regexes of tensors that carry nothing here: zeros of symmetric weights, g_idx in natural order."""
        return [] if self.is_native else [f"{suffix}$" for suffix in _IDLE]

    @property
    def is_native(self) -> bool:
        """All tensors load as they are."""
        return not self._converted

    def conversions(self, of_model: list) -> list:
        """Those of the model, and before them the ones needed here: the first that fits a tensor applies."""
        merges, plain = [], []
        dense_merges = [c for c in of_model if merges_matrices(c) and not is_of_packed(c)]
        for suffix, packed in self._converted.items():
            before: list[ConversionOps] = [ToPacked(self, suffix)]
            # only compressed-tensors stores shapes
            after: list[ConversionOps] = [AddShape(self)] if suffix == "qweight" else []
            plain.append(WeightConverter(rf"\.{suffix}$", f".{packed}", before + after))
            for conversion in dense_merges:
                sources = [source.removesuffix("weight") + suffix for source in conversion.source_patterns]
                targets = [packed_name(target, packed) for target in conversion.target_patterns]
                merges.append(WeightConverter(sources, targets, [*before, *conversion.operations, *after]))
        made = merges + plain
        replaced = {source for conversion in made for source in conversion.source_patterns}
        return made + [c for c in of_model if replaced.isdisjoint(c.source_patterns)]


def _combined(site: Site, weights: list[StoredWeight]) -> QuantizedSite:
    """One scheme for what is one parameter in memory: the experts of a layer, gate and up in each."""
    first = weights[0]
    for other in weights:
        if replace(other.scheme, sym=first.scheme.sym) != first.scheme:
            raise InputError(
                f"{other.base} is {other.scheme.name} and {first.base} {first.scheme.name}: experts need one scheme"
            )
        if other.act_order and site.kind == "experts":
            raise InputError(f"{other.base} has act-order: lowbit runs experts without it only")
    sym = all(weight.scheme.sym for weight in weights)
    return QuantizedSite(site, replace(first.scheme, sym=sym), any(weight.act_order for weight in weights))


def _packed_names(site: Site) -> list[str]:
    suffixes = (*packed_format.PACKED_SUFFIXES, "weight_g_idx")
    if site.kind == "experts":
        return [packed_name(site.parameter, suffix) for suffix in suffixes]
    return [f"{site.module}.{suffix}" for suffix in suffixes]


class _OfModel(ConversionOps):
    """An operation that looks up which weight its tensors belong to."""

    def __init__(self, model: StoredModel):
        self._model = model

    def __deepcopy__(self, memo):
        return self  # transformers copies operations for every parameter; these have no state of their own


class ToPacked(_OfModel):
    """Tensors of stored weights -> those of compressed-tensors, one for one, under the same patterns."""

    def __init__(self, model: StoredModel, suffix: str):
        super().__init__(model)
        self._suffix = suffix

    def convert(self, input_dict, full_layer_name=None, target_patterns=None, model=None, **kwargs):
        owner, part = self._model.owner[full_layer_name], self._model.part(self._model.owner[full_layer_name])
        # a loader may leave it to operations to cast
        dtype = model.get_parameter(full_layer_name).dtype

        def one(tensor):
            packed = self._model.stored.config.to_packed(self._suffix, tensor, owner.scheme, part)[1]
            return packed.to(dtype) if packed.is_floating_point() else packed

        converted = {}
        for pattern, tensors in input_dict.items():
            parts = [one(tensor) for tensor in (tensors if isinstance(tensors, list) else [tensors])]
            if owner.site.kind == "experts":
                converted[pattern] = parts
            else:
                converted[target_patterns[0]] = parts[0]
        return converted


class AddShape(_OfModel):
    """Adds the `weight_shape` that goes with a packed tensor."""

    def convert(self, input_dict, full_layer_name=None, target_patterns=None, **kwargs):
        (packed,) = input_dict.values()
        packed = packed[0] if isinstance(packed, list) else packed
        owner = self._model.owner[full_layer_name]
        merged = self._model.merged(owner)
        shape = torch.tensor(self._model.part(owner) * merged)
        if owner.site.kind == "experts":
            shape = shape.expand(len(packed), -1).contiguous()
        name = target_patterns[0]
        return {name: packed, f"{name.removesuffix('packed')}shape": shape}
