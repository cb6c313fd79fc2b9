"""The names of packed tensors: while a model loads, in the config of what is saved, and when it is saved."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from lowbit.discovery import CheckpointNames, Site, named_in_config
from lowbit.formats import compressed_tensors as packed_format
from lowbit.layers.embedding import QuantizedEmbedding
from lowbit.layers.experts import expert_weights
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import Scheme
from lowbit.transformers_api import (
    keep_dimensions,
    keeps_matrices,
    merges_matrices,
    original_sources,
    save_with,
    with_suffixes,
)

_SUFFIXES = tuple(suffix.removeprefix("weight") for suffix in packed_format.PACKED_SUFFIXES)


@dataclass(frozen=True)
class QuantizedSite:
    """A weight of the model that is quantized, or becomes so. act_order: its groups are not of consecutive inputs."""

    site: Site
    scheme: Scheme
    act_order: bool = False


def is_of_packed(conversion) -> bool:
    """Whether a conversion takes packed tensors, not the dense ones whose names they extend."""
    return original_sources(conversion)[0].endswith(_SUFFIXES)


class PackedNames:
    """What the quantized tensors of a model are called, and what its config says of them.

    names, sites: of the model before its modules were replaced. tensors: (name, number of dimensions) of what its
    checkpoint stores, a quantized weight as one matrix. schemes: parameter -> Scheme of what is quantized now.
    """

    def __init__(
        self, names: CheckpointNames, sites: dict[str, Site], tensors: list[tuple[str, int]], schemes: dict[str, Scheme]
    ):
        self.names, self.sites, self.tensors, self.schemes = names, sites, tensors, schemes
        self._conversions: list = []

    def conversions(self, of_model: list) -> list:
        """Those by which compressed-tensors loads, from the ones of the model: their reverse is how it is saved."""
        # transformers would have packed tensors split and permuted like dense ones: those are stored as parameters
        kept = [c for c in of_model if keeps_matrices(c) or not is_of_packed(c)]
        self._conversions = [made for c in kept for made in (c, *with_suffixes(c, _SUFFIXES, self.schemes))]
        keep_dimensions(self._conversions)
        return self._conversions

    def save_merged(self, model: nn.Module, computed_from: Collection[str]) -> None:
        """Let saving reverse the merges of packed experts, of which a dense or foreign checkpoint used none.

        computed_from: source patterns of the conversions that gave what was quantized: it stays under the names of its
        parameters.
        """
        used = [c for c in self._conversions if c.was_used() or is_of_packed(c) or merges_matrices(c)]
        save_with(model, [c for c in used if not any(source in computed_from for source in c.source_patterns)])

    def config(self, model: nn.Module) -> dict:
        """The `quantization_config` of compressed-tensors."""
        usual, _ = Counter(self.schemes.values()).most_common(1)[0]
        named = named_in_config(model, self.names, self.sites, self.schemes, self.tensors, usual)
        return packed_format.config(usual, *named)

    def follow(self, model: nn.Module) -> bool:
        """Take in which layers were replaced since the model was loaded. Returns whether any was."""
        now = {name: scheme for name, scheme in _quantized(model).items() if name in self.sites}
        changed, self.schemes = now != self.schemes, now
        return changed


def _quantized(model: nn.Module) -> Mapping[str, Scheme]:
    """Parameter name -> scheme of all that is quantized; PEFT keeps a layer as the `base_layer` of its own."""
    found = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(module, LowbitLinear | QuantizedEmbedding):
            found[f"{name}.weight"] = module.scheme
        found |= {f"{name}.{parameter}": weights.scheme for parameter, weights in expert_weights(module).items()}
    return found
