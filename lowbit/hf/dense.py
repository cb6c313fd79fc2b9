"""Dense checkpoints, quantized while transformers loads them: no dense copy of the model is ever in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import ConversionOps

from lowbit.checkpoint.computed import ComputedTensor, as_loaded
from lowbit.checkpoint.layout import read_header
from lowbit.discovery import CheckpointNames
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.packed import QuantizedSite
from lowbit.layers.experts import finish_experts, pack_experts, packed_name
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Recipe
from lowbit.quantizers import get_quantizer


class DenseModel:
    """sites: parameter -> QuantizedSite of what is quantized, each by `recipe`, from the dense checkpoint in `files`.

    damaged: parameters that held NaN or infinite values; transformers swallows what is raised while it loads.
    """

    idle: Sequence[str] = ()
    is_native = False

    def __init__(
        self, names: CheckpointNames, files: Sequence[str | Path], sites: dict[str, QuantizedSite], recipe: Recipe
    ):
        self.sites, self.damaged = sites, list[str]()
        self._names, self._recipe = names, recipe
        headers = [read_header(Path(file)) for file in files if str(file).endswith(".safetensors")]
        stored = {info.name: info for header in headers for info in header}
        loaded = as_loaded(stored, names, sites).values()
        self.tensors = [(info.name, len(info.shape)) for info in loaded]
        conversions = [info.conversion for info in loaded if isinstance(info, ComputedTensor)]
        self.computed_from = {pattern for conversion in conversions for pattern in conversion.sources.values()}
        # the input embedding -> output embeddings that are made of the same tensor, as the checkpoint has no other
        found = {names.locate(name)[0] for name, _ in self.tensors}
        heads = [name for name, of in sites.items() if of.site.is_head and name not in found]
        self.tensors += [(name, 2) for name in heads]
        self.made_of = {name: heads for name, of in sites.items() if of.site.kind == "embedding"}

    def conversions(self, of_packed: list) -> list:
        return of_packed

    def quantized(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The packed tensors of a parameter of `sites`, cast to `dtype` before, by their suffixes."""
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            self.damaged.append(name)
        site, scheme, tensor = self.sites[name].site, self.sites[name].scheme, tensor.to(dtype)

        def one(matrix: torch.Tensor) -> QuantWeight:
            return get_quantizer(self._recipe.method).quantize(matrix, {}, scheme, self._recipe.options)[0]

        if site.kind == "experts":
            return pack_experts(tensor, scheme, site.transposed, self._names.merged(name), one)
        return packed_format.pack(one(tensor.T.contiguous() if site.transposed else tensor))


class QuantizeOnLoad(ConversionOps):
    """Takes dense tensors, of one parameter or of those that one tensor is split into, and gives the packed tensors of
    those that are quantized, under their full names."""

    def __init__(self, source: DenseModel, dtype: torch.dtype, cut: Callable[[str, torch.Tensor], torch.Tensor]):
        """cut: (full name of a packed tensor, the tensor) -> what this process has of it."""
        self._source, self._dtype, self._cut = source, dtype, cut

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        names = [full_layer_name] if len(input_dict) == 1 else list(input_dict)
        made = {}
        for name, tensor in zip(names, input_dict.values(), strict=True):
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            if name not in self._source.sites:
                made[name] = tensor
                continue
            for parameter in (name, *self._source.made_of.get(name, ())):
                made |= self._packed(parameter, tensor, model, missing_keys)
        return made

    def _packed(
        self, name: str, tensor: torch.Tensor, model: nn.Module, missing_keys: set[str]
    ) -> dict[str, torch.Tensor]:
        packed = self._source.quantized(name, tensor, self._dtype)
        owner, _, leaf = name.rpartition(".")
        module, site = model.get_submodule(owner), self._source.sites[name].site
        missing_keys.discard(name)
        if site.kind == "experts":
            finish_experts(module, leaf)
            made = {packed_name(name, suffix): part for suffix, part in packed.items()}
        else:
            delattr(module, "weight")  # the placeholder
            made = {f"{site.module}.{suffix}": part for suffix, part in packed.items()}
        return {full: self._cut(full, part) for full, part in made.items()}
