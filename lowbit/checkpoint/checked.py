"""Tensors of a checkpoint, checked for damage as they are read."""

import torch

from lowbit.checkpoint.layout import StoredTensor
from lowbit.checkpoint.reader import CheckpointReader
from lowbit.errors import InputError

# What the bits of a magnitude are from here on is NaN or infinite, and an integer type as wide
_NOT_FINITE = {
    torch.bfloat16: (0x7F80, torch.int16),
    torch.float16: (0x7C00, torch.int16),
    torch.float32: (0x7F800000, torch.int32),
    torch.float64: (0x7FF0000000000000, torch.int64),
    torch.float8_e4m3fn: (0x7F, torch.int8),  # has NaN only
    torch.float8_e5m2: (0x7C, torch.int8),
}
_CHECKED_ELEMENTS = 2**20


def read_checked(reader: CheckpointReader, name: str) -> torch.Tensor:
    """Read a tensor; raises InputError if it holds NaN or infinity."""
    tensor = reader.tensor(name)
    check_finite(tensor, reader.tensors[name])
    return tensor


def check_finite(tensor: torch.Tensor, info: StoredTensor) -> None:
    """Raise InputError if a floating tensor holds NaN or infinity. A third of the cost of isfinite."""
    first, integer = _NOT_FINITE.get(tensor.dtype, (0, None))
    if integer is None or not tensor.numel():
        return
    magnitude = torch.iinfo(integer).max
    bits = tensor.view(-1).view(integer)
    scratch = torch.empty(min(_CHECKED_ELEMENTS, bits.numel()), dtype=integer)

    def magnitudes(part):
        return torch.bitwise_and(part, magnitude, out=scratch[: part.numel()])

    if all(int(magnitudes(part).amax()) < first for part in bits.split(_CHECKED_ELEMENTS)):
        return
    bad = sum(int((magnitudes(part) >= first).sum()) for part in bits.split(_CHECKED_ELEMENTS))
    raise InputError(
        f"{info.name} in {info.file.name} holds {bad:,} NaN or infinite values of {info.numel:,}: "
        "the checkpoint is damaged, download or export it again"
    )
