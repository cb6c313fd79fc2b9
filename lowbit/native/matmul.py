"""torch's product of few rows with a dense matrix, as matmul.c computes it."""

from collections.abc import Callable
from functools import partial

import torch

from lowbit.native.build import constant, library
from lowbit.native.linear import DTYPES


def replay(y: torch.Tensor, x: torch.Tensor, transposed: torch.Tensor) -> Callable | None:
    """For those who repeat `mm(x, transposed)` on tensors that stay where they are: the call that computes its result
    `y` [M, N] anew, or None where the kernel does not know how. x [M, K]; transposed [K, N], of a weight [N, K]."""
    weight, tensors = transposed.t(), (x, transposed.t(), y)
    if (
        x.dtype not in DTYPES
        or len(x) > constant("MATMUL_ROWS")
        or not all(tensor.is_contiguous() for tensor in tensors)
    ):
        return None
    wide = torch.empty(x.shape)
    pointers = (tensor.data_ptr() for tensor in tensors)
    call = partial(
        library().lowbit_matmul, *pointers, constant(DTYPES[x.dtype]), len(x), *weight.shape, wide.data_ptr()
    )
    call.keeps = *tensors, wide
    return call
