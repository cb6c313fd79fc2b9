"""The operators of the native backend, differentiable, and what each number of rows is multiplied with.

Few rows are multiplied by the packed weight as it is (linear.c). Many rows are rounded to 8 bits, in blocks of inputs,
where the caller allows it (gemm.c). Exactly, they are multiplied in dot products of bfloat16 where the processor has
fast ones, as few rows are elsewhere, or by a dense copy, made block by block, where that is faster. With integer
activations the kernel multiplies int8 by int8 at every number of rows.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch

from lowbit.native import gemm
from lowbit.native.abi import Experts, Weight
from lowbit.native.build import constant, has_amx, library
from lowbit.native.linear import DTYPES, PIECES, dense_blocks, product, weight_of_tensors
from lowbit.numerics import dense
from lowbit.numerics.activations import quantize_input
from lowbit.numerics.scheme import Scheme

# From how many rows on inputs are rounded, where they may be: that is at least 1.2 times as fast there, in
# scripts/benchmarks/cpu_products.py
ROUNDED_ROWS = 32
# From how many rows on a dense copy and torch's GEMM win, in the same benchmark: with AVX2 in float32, which takes two
# integers for an input; in bf16 nowhere, and with torch's tiles of AMX on one of four shapes
_DENSE_ROWS_FP32 = 64
# From how many rows on dot products of bfloat16 are faster than those of integers, in the same benchmark: on Zen 4.
# Processors with AMX multiply integers twice as fast
_BF16_ROWS = 64
# Rows of integers that are made at a time: more would not stay in the cache of a core, and take memory
_ROWS_OF_INTEGERS = 64


def _linear(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features, exact=True):
    scheme, in_features = _parse(scheme), x.shape[1]
    weight = weight_of_tensors(codes, scales, zeros, scheme, (out_features, in_features))
    if scheme.activations is not None:
        y = _integer_product(x, weight, scheme, input_scale, input_zero)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    rounded = _is_rounded(x, scheme, exact)
    if not rounded and dense_is_faster(x):
        return dense.product(x, dense_blocks(weight, dense.gemm_dtype(x.dtype)), out_features, bias)
    stored = x.dtype if x.dtype in DTYPES else torch.float32
    y = torch.empty(len(x), out_features, dtype=stored)
    bias, x, dtype = None if bias is None else bias.to(stored), x.to(stored).contiguous(), x.dtype
    if rounded or _hardware_multiplies(x, scheme):
        gemm.product(weight, x, y, bias, "int8" if rounded else "bf16")()
    else:
        _exact_product(weight, x, y, bias, PIECES[dtype])
    return y.to(dtype)


def _exact_product(weight: Weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, pieces: int) -> None:
    for start in range(0, len(x), _ROWS_OF_INTEGERS):
        rows = slice(start, start + _ROWS_OF_INTEGERS)
        product(weight, x[rows], y[rows], bias, pieces)()


def _is_rounded(x: torch.Tensor, scheme: Scheme, exact: bool) -> bool:
    return not exact and len(x) >= ROUNDED_ROWS and gemm.refuse(scheme, "int8", torch.float32) is None


def _hardware_multiplies(x: torch.Tensor, scheme: Scheme) -> bool:
    """Whether exact inputs are multiplied in bfloat16, by a processor that has fast dot products of it."""
    fast = library().level == "avx512bf16" and not has_amx()
    return len(x) >= _BF16_ROWS and fast and gemm.refuse(scheme, "bf16", x.dtype) is None


def dense_is_faster(x: torch.Tensor) -> bool:
    many = PIECES[x.dtype] > 1 and len(x) >= _DENSE_ROWS_FP32
    return many and not getattr(library(), "level", "").startswith("avx512")


def _integer_product(x, weight: Weight, scheme: Scheme, input_scale, input_zero) -> torch.Tensor:
    steps, scale, zero = quantize_input(x, scheme.activations, input_scale, input_zero)
    steps = steps.float() if zero is None else steps.float().sub_(zero)
    y = steps.new_empty(len(x), weight.out_features)
    _exact_product(weight, steps, y, None, 1)
    return y.mul_(scale)


def replay(
    y, x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features, exact=True
) -> Callable | None:
    """For those who repeat `linear_native` on tensors that stay where they are: the call that computes its result `y`
    anew, where that is one call of a kernel."""
    parsed, alike = _parse(scheme), bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    rounded = _is_rounded(x, parsed, exact)
    one_call = x.dtype in DTYPES and x.is_contiguous() and alike and (rounded or not dense_is_faster(x))
    if parsed.activations is not None or not one_call:
        return None
    weight = weight_of_tensors(codes, scales, zeros, parsed, (out_features, x.shape[1]))
    if rounded or _hardware_multiplies(x, parsed):
        call = gemm.product(weight, x, y, bias, "int8" if rounded else "bf16")
    else:
        call = product(weight, x, y, bias, PIECES[x.dtype])
    call.keeps += (codes, scales, zeros)
    return call


def _experts(x, codes, scales, zeros, input_scale, input_zero, bias, expert_start, scheme, out_features, exact=True):
    parsed = _parse(scheme)
    if parsed.activations is None:
        stored = x.dtype if x.dtype in DTYPES else torch.float32
        made = torch.empty(len(x), out_features, dtype=stored)
        bias = None if bias is None else bias.to(stored).contiguous()
        wide, start = x.to(stored).contiguous(), expert_start.int().contiguous()
        tensors = (tensor if tensor is None else tensor.contiguous() for tensor in (codes, scales, zeros))
        _product_of_experts(made, wide, *tensors, bias, start, parsed, PIECES[x.dtype], exact)()
        return made.to(x.dtype)
    tensors = codes, scales, zeros, input_scale, input_zero, bias
    y = x.new_zeros(x.shape[0], out_features)  # for the rows behind the last expert's
    for expert, (start, stop) in enumerate(pairwise(expert_start.tolist())):
        if start < stop:
            of_expert = (None if tensor is None else tensor[expert] for tensor in tensors)
            y[start:stop] = _linear(x[start:stop], *of_expert, scheme, out_features, exact)
    return y


def _product_of_experts(y, x, codes, scales, zeros, bias, start, scheme: Scheme, pieces: int, exact: bool) -> Callable:
    """The call that computes y, with zeros in rows behind the last expert's; all tensors contiguous, x, y and the bias
    of one dtype of DTYPES. Experts with few rows and those with many are two calls, in which threads pass from one
    expert to the next without waiting for each other."""
    kernels, threads = library(), torch.get_num_threads()
    weight = weight_of_tensors(codes, scales, zeros, scheme, (y.shape[1], x.shape[1]))
    rounded = not exact and gemm.refuse(scheme, "int8", x.dtype) is None
    operands = x.data_ptr(), constant(DTYPES[x.dtype]), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x)
    scratch = torch.empty(kernels.lowbit_linear_scratch(weight, len(x)), dtype=torch.uint8)
    few = Experts(start.data_ptr(), len(start) - 1, 1, ROUNDED_ROWS - 1 if rounded else len(x))
    calls = [partial(kernels.lowbit_linear_experts, weight, few, *operands, pieces, scratch.data_ptr())]
    keeps = [y, x, codes, scales, zeros, bias, start, scratch]
    if rounded and len(x) >= ROUNDED_ROWS:
        arithmetic, many = constant("INT8"), Experts(start.data_ptr(), len(start) - 1, ROUNDED_ROWS, len(x))
        tiles = torch.empty(kernels.lowbit_gemm_scratch(weight, arithmetic, len(x), threads), dtype=torch.uint8)
        calls.append(
            partial(kernels.lowbit_gemm_experts, weight, many, arithmetic, *operands, threads, tiles.data_ptr())
        )
        keeps.append(tiles)
    call = partial(_each, calls)
    call.keeps = keeps
    return call


def _each(calls: list[Callable]) -> None:
    for call in calls:
        call()


def replay_experts(
    y, x, codes, scales, zeros, input_scale, input_zero, bias, expert_start, scheme, out_features, exact=True
) -> Callable | None:
    """The same for `experts_native`, whose rows may belong to others each time."""
    parsed, tensors = _parse(scheme), (y, x, codes, scales, zeros, bias, expert_start)
    alike = bias is None or bias.dtype == x.dtype
    contiguous = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    known = x.dtype in DTYPES and expert_start.dtype == torch.int32
    if parsed.activations is not None or not (known and alike and contiguous):
        return None
    return _product_of_experts(*tensors, parsed, PIECES[x.dtype], exact)


def _grad_input(grad, codes, scales, zeros, scheme, in_features):
    weight = weight_of_tensors(codes, scales, zeros, _parse(scheme), (grad.shape[1], in_features))
    return dense.grad_input(grad, dense_blocks(weight, dense.gemm_dtype(grad.dtype)), in_features)


_parse = cache(Scheme.parse)
_library = torch.library.Library("lowbit", "FRAGMENT")
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros"
_library.define(
    f"linear_native(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? input_zero, Tensor? bias, str scheme, "
    "int out_features, bool exact=True) -> Tensor"
)
_library.define(
    f"experts_native(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? input_zero, Tensor? bias, Tensor expert_start, "
    "str scheme, int out_features, bool exact=True) -> Tensor"
)
_library.define(f"grad_input_native(Tensor grad, {_WEIGHT}, str scheme, int in_features) -> Tensor")
_library.impl("linear_native", _linear, "CPU")
_library.impl("experts_native", _experts, "CPU")
_library.impl("grad_input_native", _grad_input, "CPU")


@torch.library.register_fake("lowbit::linear_native", lib=_library)
def _(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features, exact=True):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit::experts_native", lib=_library)
def _(x, codes, scales, zeros, input_scale, input_zero, bias, expert_start, scheme, out_features, exact=True):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit::grad_input_native", lib=_library)
def _(grad, codes, scales, zeros, scheme, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _keep_for_backward(ctx, inputs, output):
    x, codes, scales, zeros, *_, scheme, _, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.form = scheme, x.shape[1]


def _backward(ctx, grad):
    """Straight-through estimator: the gradient ignores that activations were rounded."""
    of_x = torch.ops.lowbit.grad_input_native(grad, *ctx.saved_tensors, *ctx.form)
    of_bias = grad.sum(0) if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, None, of_bias, None, None, None


def _keep_experts_for_backward(ctx, inputs, output):
    x, codes, scales, zeros, *_, expert_start, scheme, _, _ = inputs
    ctx.save_for_backward(codes, scales, zeros, expert_start)
    ctx.form = scheme, x.shape[1]


def _backward_of_experts(ctx, grad):
    *weight, expert_start = ctx.saved_tensors
    of_x, of_bias = grad.new_zeros(len(grad), ctx.form[1]), grad.new_zeros(len(weight[0]), grad.shape[1])
    for expert, (start, stop) in enumerate(pairwise(expert_start.tolist())):
        part, of_expert = grad[start:stop], (None if tensor is None else tensor[expert] for tensor in weight)
        of_x[start:stop] = torch.ops.lowbit.grad_input_native(part, *of_expert, *ctx.form)
        of_bias[expert] = part.sum(0)
    return of_x, None, None, None, None, None, of_bias if ctx.needs_input_grad[6] else None, None, None, None, None


torch.library.register_autograd("lowbit::linear_native", _backward, setup_context=_keep_for_backward, lib=_library)
torch.library.register_autograd(
    "lowbit::experts_native", _backward_of_experts, setup_context=_keep_experts_for_backward, lib=_library
)
