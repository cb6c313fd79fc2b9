"""Half precision dtypes by the names that commands know."""

import torch

from lowbit.numerics.scheme import DTYPE_NAMES

DTYPES = dict(zip(DTYPE_NAMES, (torch.float16, torch.bfloat16), strict=True))


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
    """A finite tensor in `dtype` if it is floating, else as it is; how many of its values were too large, and became
    the largest of the dtype; how many were not zero and now are."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor, 0, 0
    largest = torch.finfo(dtype).max
    too_large = int((tensor.abs() > largest).sum())
    made = (tensor.clamp(-largest, largest) if too_large else tensor).to(dtype)
    return made, too_large, int(torch.count_nonzero(tensor) - torch.count_nonzero(made))
