"""How many numbers of a tensor are NaN or infinite, for a tenth of what isfinite costs where none are."""

import torch

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


def not_finite(tensor: torch.Tensor) -> int:
    """The count; 0 for dtypes that have no such numbers. tensor: contiguous."""
    first, integer = _NOT_FINITE.get(tensor.dtype, (0, None))
    if integer is None or not tensor.numel():
        return 0
    magnitude = torch.iinfo(integer).max
    parts = tensor.view(-1).view(integer).split(_CHECKED_ELEMENTS)
    scratch = torch.empty(len(parts[0]), dtype=integer)
    magnitudes = (torch.bitwise_and(part, magnitude, out=scratch[: len(part)]) for part in parts)
    if all(int(each.amax()) < first for each in magnitudes):
        return 0
    return sum(int(((part & magnitude) >= first).sum()) for part in parts)
