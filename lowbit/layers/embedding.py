"""An input embedding whose table stays quantized: rows are looked up, then dequantized.

Like the experts of `lowbit.layers.experts`, the module keeps its class and gains another one before it. Whatever its
authors do with rows (some scale them) they do with the dequantized ones: their forward runs on a table that has no
others. The table never leaves the form of compressed-tensors, whose tensors are the parameters of the module.
"""

from functools import cache

import torch
from torch import nn

from lowbit.formats import compressed_tensors as packed_format
from lowbit.formats.bitpack import unpack
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.torch_api import parameter_dict
from lowbit.transformers_api import mark_loaded


class QuantizedEmbedding(nn.Module):
    """What the class of an embedding gains when its table [num_embeddings, embedding_dim] is quantized by `scheme`."""

    scheme: Scheme
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    loaded = False  # whether `prepare` was called
    zeros: torch.Tensor | None  # uint8 [num_embeddings, G], of an asymmetric table that was prepared

    def __getattr__(self, name):
        # Some models look at `embedding.weight`, mostly at its dtype: it is made when asked for. While a model loads,
        # transformers asks for what it would initialise, and gets something of that shape which takes no memory
        if name == "weight" and "weight" not in parameter_dict(self):
            return mark_loaded(self.dequantize() if self.loaded else self.weight_scale[:1, :1].expand(self.shape))
        return super().__getattr__(name)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def packed_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Of the tensors of a checkpoint, as `formats.compressed_tensors.shapes` has them."""
        return packed_format.shapes(self.scheme, *self.shape)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors a compressed-tensors checkpoint holds for this module."""
        return {name: self.get_parameter(name).detach() for name in packed_format.suffixes(self.scheme)}

    def quantized_weight(self) -> QuantWeight:
        return packed_format.unpack_weight(self.packed_tensors(), self.scheme, *self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole table [num_embeddings, embedding_dim] in `dtype` (default: that of its scales)."""
        return dequantize(self.quantized_weight(), dtype)

    def prepare(self) -> "QuantizedEmbedding":
        """Ready to run, once the table is loaded: zero points are packed along the rows, and cannot be looked up so."""
        self.loaded = True
        if not self.scheme.sym and not self.weight_scale.is_meta:
            self.register_buffer("zeros", self._unpacked_zeros(), persistent=False)
        return self

    def _unpacked_zeros(self) -> torch.Tensor:
        return unpack(self.weight_zero_point.T, self.scheme.bits, self.num_embeddings).T.contiguous()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, embedding_dim] of the token ids [T], in the dtype of the scales."""
        codes = unpack(self.weight_packed[ids], self.scheme.bits, self.embedding_dim)
        zeros = None
        if not self.scheme.sym:
            prepared = getattr(self, "zeros", None)  # not of what accelerate moves in and out of every call
            zeros = (self._unpacked_zeros() if prepared is None else prepared)[ids]
        return dequantize(QuantWeight(codes, self.weight_scale[ids], self.scheme, zeros))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self.rows(input_ids.flatten())
        if _dense_class(self).forward is nn.Embedding.forward and self.max_norm is None:
            return rows.view(*input_ids.shape, self.embedding_dim)
        positions = torch.arange(len(rows), device=rows.device).view(input_ids.shape)
        # torch insists that the padding is one of the rows that there are, and needs it for gradients only
        padding = self.padding_idx
        self.__dict__ |= {"weight": rows, "padding_idx": None}
        try:
            return super().forward(positions)
        finally:
            self.padding_idx = padding
            del self.__dict__["weight"]

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.loaded:
            self.prepare()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


def _dense_class(module: QuantizedEmbedding) -> type:
    return type(module).__bases__[1]


@cache
def _quantized_class(embedding_class: type) -> type:
    return type(f"Quantized{embedding_class.__name__}", (QuantizedEmbedding, embedding_class), {})


def quantize_embedding(module: nn.Embedding, scheme: Scheme, dtype: torch.dtype, placeholder: bool = False) -> None:
    """Give an embedding the packed parameters (uninitialised) of its table in place of the dense one.

    Args:
        module: The embedding, of any class that looks rows up in `weight`.
        scheme: Of the table; its groups lie along embedding_dim.
        dtype: Of the scales, and of the rows.
        placeholder: Keep a dense `weight` on the meta device, as the slot that a loader fills with what it quantizes.
    """
    device, dense = module.weight.device, torch.empty_like(module.weight, device="meta")
    del module.weight
    if placeholder:
        module.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
    module.__class__ = _quantized_class(type(module))
    module.scheme = scheme  # type: ignore[assignment]  # mypy does not see the new class
    for name, (shape, stored) in packed_format.shapes(scheme, module.num_embeddings, module.embedding_dim).items():
        tensor = torch.empty(shape, dtype=stored or dtype, device=device)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def restore_embedding(module: nn.Module, dtype: torch.dtype) -> None:
    """Back to a dense table and the class it was."""
    if not isinstance(module, QuantizedEmbedding):
        return
    dense = module.dequantize(dtype)
    for name in module.packed_shapes:
        delattr(module, name)
    if hasattr(module, "zeros"):
        del module.zeros
    for name in ("scheme", "loaded"):
        module.__dict__.pop(name, None)
    module.__class__ = _dense_class(module)
    module.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
