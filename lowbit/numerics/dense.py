"""What CPU backends do with many rows: a dense copy of the weight, block by block, and the machine's best GEMM.

`blocks` yields (start, stop, dense [stop - start, in_features]) over the outputs.
"""

from functools import cache

import torch

from lowbit.torch_api import cpu_has_bf16_products, cpu_has_fp16_products

# Elements of a block: small enough to stay in cache between the passes over it
BLOCK_ELEMENTS = 2**20


@cache
def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies dense matrices fastest: its own where it has instructions for it."""
    native = {torch.bfloat16: cpu_has_bf16_products, torch.float16: cpu_has_fp16_products}
    return dtype if dtype in native and native[dtype]() else torch.float32


def product(x: torch.Tensor, blocks, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias in the dtype of x, from blocks in gemm_dtype(x.dtype)."""
    dtype = gemm_dtype(x.dtype)
    wide, y = x.to(dtype), x.new_empty(x.shape[0], out_features)
    for start, stop, weight in blocks:
        part = None if bias is None else bias[start:stop].to(dtype)
        y[:, start:stop] = torch.nn.functional.linear(wide, weight, part)
    return y


def grad_input(grad: torch.Tensor, blocks, in_features: int) -> torch.Tensor:
    """grad [M, out_features] times W; blocks as above."""
    dtype = gemm_dtype(grad.dtype)
    # summed in float32: in bf16 the rounding of each block would add up
    total = grad.new_zeros(grad.shape[0], in_features, dtype=torch.float32)
    for start, stop, weight in blocks:
        total += grad[:, start:stop].to(dtype) @ weight
    return total.to(grad.dtype)
