"""A checkpoint that is quantized already, as one of plain weights: what quantizing it again starts from.

Floating-point encodings of others are decoded below (`lowbit.checkpoint.decoded`); integers, ours and those of others,
are dequantized here. Both when a tensor is read, and at no other time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.decoded import decoded
from lowbit.checkpoint.reader import Headers, unquantized
from lowbit.errors import InputError
from lowbit.folders.quantized import QuantizedFolder
from lowbit.folders.stored import StoredWeight
from lowbit.formats import is_format
from lowbit.numerics.finite import not_finite
from lowbit.numerics.grid import dequantize

# Weights that are dequantized at a time: their float32 copies stay in the cache
_AT_ONCE = 2**19


@dataclass(frozen=True)
class DequantizedTensor(TensorInfo):
    """A parameter that is computed from stored codes, scales and zeros."""

    source: QuantizedFolder
    weight: StoredWeight
    transposed: bool

    @property
    def file(self) -> Path:
        """Where its codes are."""
        first = next(iter(self.weight.tensors.values()))
        return self.source.reader.tensors[first.name].file

    @property
    def stored_bytes(self) -> int:
        return self.weight.nbytes

    def read(self) -> torch.Tensor:
        """Its data in memory of its own. Raises InputError for values that are too large for its dtype."""
        matrices = self.source.stored.quantized(self.weight)
        dense = torch.empty(len(matrices), *self.shape[-2:], dtype=self.dtype)
        for made, qweight in zip(dense, matrices, strict=True):
            rows = max(1, _AT_ONCE // qweight.in_features)
            for start in range(0, qweight.out_features, rows):
                some = slice(start, min(start + rows, qweight.out_features))
                part = dequantize(qweight.rows(some.start, some.stop), torch.float32)
                part = cast_checked(part, self.dtype, self.name)
                if self.transposed:
                    made[:, some] = part.T
                else:
                    made[some] = part
        return dense if self.weight.experts else dense[0]

    def read_rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Some rows (of the first dimension), one after the other."""
        return self.read()[list(indices)]


def dequantized(source: QuantizedFolder, weight: StoredWeight, dtype: torch.dtype | None = None) -> DequantizedTensor:
    """The parameter of a quantized weight, in `dtype` or that of its scales. Raises InputError where it is none."""
    site = source.site(weight.base)
    if site is None and weight.base not in source.for_others:
        raise InputError(f"{weight.base} is not a module of the model that config.json describes")
    name = weight.base if weight.experts else f"{weight.base}.weight"
    transposed = site is not None and source.is_stored_transposed(site, name)
    shape = weight.shape[::-1] if transposed else weight.shape
    lead = (weight.experts,) if weight.experts else ()
    return DequantizedTensor(name, dtype or weight.dtype, (*lead, *shape), source, weight, transposed)


def cast_checked(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A finite tensor in `dtype`. Raises InputError where that has no such large numbers."""
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not_finite(cast):
        largest = float(tensor.abs().max())
        raise InputError(f"{name} has values of {largest:.3g}, too large for {dtype}: choose bfloat16 or float32")
    return cast


def as_dense(reader: Headers, trust_remote_code: bool = False) -> Headers:
    """The checkpoint behind `reader` as one that is not quantized; itself, where it is not. Integers of a repository,
    of which headers alone are known, stay as they are.

    Raises:
        InputError: It is quantized by a method that nothing here reads, or parts of its weights are missing.
    """
    made = decoded(reader)
    config = made.quantization_config
    if config is None or not is_format(config) or not isinstance(reader, CheckpointReader):
        return made
    source = QuantizedFolder(reader.folder, trust_remote_code=trust_remote_code)
    weights = [dequantized(source, weight) for weight in source.stored.weights.values()]
    return unquantized(reader, [*weights, *source.kept, *source.beside])
