"""Sums of outer products over tokens, as moments.c computes them: bfloat16 with float32 sums, which torch's own
products of bfloat16 round to bfloat16 in the end."""

import torch

from lowbit.native.abi import Library
from lowbit.native.build import library


def is_fast(*tensors: torch.Tensor) -> bool:
    """Whether `add_outer` is the way for these: bfloat16 on a CPU that has dot products of it."""
    suited = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return suited and isinstance(kernels := library(), Library) and kernels.level == "avx512bf16"


def add_outer(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """sums += a^T b.

    Args:
        sums: Float32 [M, N], contiguous. Where `a` is `b`, only its lower triangle has a meaning afterwards.
        a, b: Bfloat16 [T, M] and [T, N], both on the CPU.
    """
    shared, a = a is b, a.contiguous()
    b = a if shared else b.contiguous()
    rows, columns = sums.shape
    if sums.dtype != torch.float32 or not sums.is_contiguous() or (rows, columns) != (a.shape[1], b.shape[1]):
        raise ValueError(f"sums are {sums.dtype} {list(sums.shape)}; expected contiguous float32 of the inputs' widths")
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or len(a) != len(b):
        raise ValueError(f"inputs are {a.dtype} and {b.dtype} of {len(a)} and {len(b)} tokens; expected bfloat16 alike")
    kernels = library()
    scratch = torch.empty(kernels.lowbit_outer_scratch(rows, columns), dtype=torch.uint8)
    kernels.lowbit_add_outer(
        a.data_ptr(), rows, b.data_ptr(), columns, len(a), sums.data_ptr(), torch.get_num_threads(), scratch.data_ptr()
    )
