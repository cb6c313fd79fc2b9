# SPDX-License-Identifier: Apache-2.0
"""Rows of x to eight bits: one program per row, which is read once and held in registers. x ~ (code - zero) * scale.

    code[m, k] = round(x[m, k] / scale[m]) + zero[m], limited to [-128, 127]

    symmetric     scale = largest |x| of the row / 127.5
    asymmetric    scale = (largest x or 0 - smallest x or 0) / 255, and a zero point
    static        scale and zero point given
    normed        any of these, of RMSNorm(x) * weight, which is never written to memory

         x [M, K]          program m              codes [M, K padded to 128]        scales, zeros [M]
    row m  ----------->    registers, BLOCK   --> ---------------- 0 0 0 0     -->  one of each
                           >= K, masked

Codes are int8 [M, K padded to 128] in [-128, 127], 0 in the padding (products need no mask then); scales float32 [M]
and zeros int8 [M]. Rounding is to nearest even of the correctly rounded quotient, as torch has it: equal to the bit to
`reference`. A row with NaN has that for a scale, dynamic ones with an infinity too: it does not pass for numbers.

Cf. ZeroQuant (Yao et al. 2022, arXiv:2206.01861), which quantizes per token and fuses that with the norm before.
"""

import torch
import triton
import triton.language as tl

from lowbit_kernels.int8.layout import MOST_INPUTS, TILE
from lowbit_kernels.launching import check_tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 1.5 * 2^23: the sum with a number below 2^22 has no bits after the point, and the low ones of its pattern are the
# integer. As a pattern, 0x4B400000
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)
# The smallest normal float32: no scale is 0 or loses bits
TINY = tl.constexpr(2.0**-126)
INFINITY_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def nearest_code(v, low, high):
    """v limited to integers from low to high, rounded to nearest even, int32."""
    v = tl.minimum(tl.maximum(v, low), high)
    return (v + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def quantize_kernel(
    x, norm_weight, codes, scales, zeros, static_scale, static_zero, in_features, padded_in, x_stride, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). None for norm_weight (no norm), zeros (symmetric), static_scale (dynamic), static_zero (0)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + k, mask=k < in_features, other=0.0).to(tl.float32)
    if norm_weight is not None:
        mean = tl.sum(v * v) / in_features
        v = v * tl.rsqrt(mean + eps) * tl.load(norm_weight + k, mask=k < in_features, other=0.0).to(tl.float32)
    # as integers, the patterns of positive numbers are in the order of the numbers, then infinity, then NaN
    largest = tl.max(v.to(tl.int32, bitcast=True) & MAGNITUDE)
    zero = 0
    if static_scale is not None:
        scale = tl.load(static_scale)
        if static_zero is not None:
            zero = tl.load(static_zero).to(tl.int32)
        numbers = largest <= INFINITY_BITS
    else:
        if zeros is None:
            scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), 127.5), TINY)
        else:
            smallest = tl.minimum(tl.min(v), 0.0)
            scale = tl.maximum(tl.div_rn(tl.maximum(tl.max(v), 0.0) - smallest, 255.0), TINY)
            zero = nearest_code(-128.0 - tl.div_rn(smallest, scale), -128.0, 127.0)
        numbers = largest < INFINITY_BITS
    tl.store(scales + row, tl.where(numbers, scale, float("nan")))
    if zeros is not None:
        tl.store(zeros + row, zero.to(tl.int8))
    code = nearest_code(tl.div_rn(v, tl.broadcast_to(scale, v.shape)), -128.0 - zero, 127.0 - zero) + zero
    tl.store(codes + row * padded_in + k, tl.where(k < in_features, code, 0).to(tl.int8), mask=k < padded_in)


def rows(
    x: torch.Tensor,
    *,
    sym: bool = True,
    static_scale: torch.Tensor | None = None,
    static_zero: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize the rows of x, or of RMSNorm(x, eps) * norm_weight. Everything on one device.

    Args:
        x: bf16, fp16 or fp32 [M, K], rows of any stride, each in one piece, K at most MOST_INPUTS.
        sym: no zero points.
        static_scale: float32 [1], of all rows; None: each has its own.
        static_zero: int8 [1], of all rows, given with static_scale unless sym.
        norm_weight: [K] in the dtype of x.
        eps: of the norm.

    Returns:
        codes int8 [M, K padded to 128], scales float32 [M], zeros int8 [M] or, if sym, None.

    Raises:
        ValueError: a tensor does not fit x, or static_zero is missing or too much.
    """
    if x.dtype not in _DTYPES or x.ndim != 2 or x.stride(1) != 1 or not 1 <= x.shape[1] <= MOST_INPUTS:
        kinds = ", ".join(map(str, _DTYPES))
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}, expected one of {kinds}, "
            f"[M, 1 to {MOST_INPUTS}] with rows in one piece"
        )
    count, in_features = x.shape
    if (static_zero is not None) != (static_scale is not None and not sym):
        raise ValueError("static_zero goes with static_scale where rows are asymmetric, and with nothing else")
    for name, tensor, dtype, shape in (
        ("norm_weight", norm_weight, x.dtype, (in_features,)),
        ("static_scale", static_scale, torch.float32, (1,)),
        ("static_zero", static_zero, torch.int8, (1,)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, dtype, shape, x.device)
    padded_in = -(-in_features // TILE) * TILE
    codes = torch.empty(count, padded_in, dtype=torch.int8, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    zeros = None if sym else torch.empty(count, dtype=torch.int8, device=x.device)
    if count:
        block = max(TILE, triton.next_power_of_2(in_features))
        with torch.cuda.device_of(x):
            quantize_kernel[(count,)](
                x, norm_weight, codes, scales, zeros, static_scale, static_zero,
                in_features, padded_in, x.stride(0), eps,
                BLOCK=block, num_warps=warps_of(block), enable_fp_fusion=True,
            )  # fmt: skip
    return codes, scales, zeros


def warps_of(block: int) -> int:
    """Sixteen elements of a row to a lane: two loads of 16 bytes in 16 bits; as many more as a long row has."""
    return min(16, max(1, block // 512))
