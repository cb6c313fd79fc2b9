"""Products of many rows with a packed weight, as gemm.c computes them: it is unpacked tile by tile, never whole.

"int8" rounds the inputs to 8 bits, 32 of them to a scale, and sums exact integers; "bf16" multiplies bfloat16 inputs as
they are. Backends run "int8" on many rows where `rounds` says that it pays, unless they are told to be exact: then they
run "bf16" where the processor has dot products of it.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from lowbit.native.abi import Weight
from lowbit.native.build import constant, library
from lowbit.native.linear import DTYPES, weight_of_tensors
from lowbit.numerics.scheme import PER_CHANNEL, Scheme

# Names of the operator's arithmetics -> of abi.h
ARITHMETICS = {"int8": "INT8", "bf16": "BF16"}
# Where `rounds`: scripts/benchmarks/int8_inputs.py measures the one, cpu_products.py the other
_ROUNDED_BITS, _ROUNDED_LEVELS = (3, 4), ("avx2", "avx512", "avx512bf16")


def refuse(scheme: Scheme, arithmetic: str, dtype: torch.dtype) -> str | None:
    """Why `gemm_native` does not multiply inputs of `dtype` with weights of a scheme, None if it does."""
    if arithmetic not in ARITHMETICS:
        return f"there is no arithmetic {arithmetic!r}: {', '.join(ARITHMETICS)}"
    if scheme.activations is not None:
        return f"{scheme.name} has integer activations, which are not inputs of {arithmetic}"
    if scheme.group_size != PER_CHANNEL and scheme.group_size % constant("CHUNK"):
        return f"a group of {scheme.group_size} inputs is not a multiple of {constant('CHUNK')}"
    if dtype not in (DTYPES if arithmetic == "int8" else (torch.bfloat16,)):
        return f"{arithmetic} does not multiply {dtype}"
    return None


def rounds(scheme: Scheme, level: str) -> bool:
    """Whether inputs of a scheme are rounded to 8 bits by default on a level of instructions: where that was measured
    to change less than a twentieth of what quantization does, and to be 1.2 times as fast or more."""
    return scheme.activations is None and scheme.bits in _ROUNDED_BITS and level in _ROUNDED_LEVELS


def product(
    weight: Weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, arithmetic: str
) -> Callable[[], None]:
    """The call that computes y = x W^T + bias, all three contiguous and of one dtype that the arithmetic knows; what
    `weight` points to must outlive it."""
    number, threads, kernels = constant(ARITHMETICS[arithmetic]), torch.get_num_threads(), library()
    scratch = torch.empty(kernels.lowbit_gemm_scratch(weight, number, len(x), threads), dtype=torch.uint8)
    pointers = x.data_ptr(), constant(DTYPES[x.dtype]), None if bias is None else bias.data_ptr(), y.data_ptr()
    call = partial(kernels.lowbit_gemm, weight, number, *pointers, len(x), threads, scratch.data_ptr())
    call.keeps = x, y, bias, scratch
    return call


def _gemm(x, codes, scales, zeros, bias, scheme, out_features, arithmetic):
    parsed = _parse(scheme)
    if reason := refuse(parsed, arithmetic, x.dtype):
        raise ValueError(reason)
    weight = weight_of_tensors(codes, scales, zeros, parsed, (out_features, x.shape[1]))
    x, bias = x.contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(len(x), out_features)
    product(weight, x, y, bias, arithmetic)()
    return y


_parse = cache(Scheme.parse)
_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define(
    "gemm_native(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, str scheme, int out_features, "
    "str arithmetic) -> Tensor"
)
_library.impl("gemm_native", _gemm, "CPU")


@torch.library.register_fake("lowbit::gemm_native", lib=_library)
def _(x, codes, scales, zeros, bias, scheme, out_features, arithmetic):
    return x.new_empty(x.shape[0], out_features)
