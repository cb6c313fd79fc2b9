"""Products with a packed weight: linear.c says what its kernels compute.

Few rows are multiplied by the packed weight as it is, many by a dense copy, made block by block. With integer
activations the kernel multiplies int8 by int8 at every number of rows; there is no dense detour. 3-bit codes are
widened to 4-bit fields: unpacking 3-bit fields costs more time than the bandwidth that they save. 5 and 6 bits are
widened to 8, and run as fast as these: what they save lies in the file.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch

from lowbit.native.abi import Weight
from lowbit.native.build import constant, library
from lowbit.numerics import dense
from lowbit.numerics.activations import quantize_input
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import Scheme

# Bits of a code -> of the field it is packed in
_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
# 16-bit integers that stand for an input
PIECES = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}
# What the kernels read and write, and their name for it; float16 becomes float32
DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}
# From how many rows of 16-bit integers on dequantize + GEMM wins: in float32 as scripts/benchmarks/cpu_linear.py has it
# with AVX2 (96 in groups of 32, 300 in one group), in bf16 a guess
_CROSSOVER_BF16, _CROSSOVER_FP32 = 16, 128
# Rows of integers that the kernels go through at a time: more would not stay in the cache of a core
_ROWS_OF_INTEGERS = 64


def _chunk(bits: int) -> int:
    return 16 // bits * constant("LANES")


def _width(in_features: int, bits: int) -> int:
    """in_features in whole chunks."""
    return -(-in_features // _chunk(bits)) * _chunk(bits)


def pack(qweight: QuantWeight) -> dict[str, torch.Tensor]:
    """The buffers of a weight in the layout of linear.c."""
    qweight.require_natural_order("native")
    bits, (out_features, in_features) = _BITS[qweight.scheme.bits], qweight.codes.shape
    rows, lanes = constant("ROWS"), constant("LANES")
    size = -(-out_features // rows), _width(in_features, bits) // _chunk(bits), rows, lanes
    codes = torch.empty(size, dtype=torch.int16)
    # scales_like, without elements: for `unpack` to know the dtype
    buffers = {"codes": codes, "scales": _by_block(qweight.scales), "scales_like": qweight.scales.new_empty(0)}
    zeros = _zeros(qweight)
    if zeros is not None:
        buffers["zeros"] = _by_block(zeros)
    buffers |= {name: getattr(qweight, name) for name in input_grid(qweight.scheme)}
    source = qweight.codes.contiguous()
    weight = _weight_of(buffers, qweight.scheme, qweight.codes.shape)
    library().lowbit_pack(weight, source.data_ptr(), codes.data_ptr())
    if not library().lowbit_linear_knows(weight):
        raise AssertionError(f"there is no kernel for {bits} bits in groups of {weight.group_size}")
    return buffers


def _zeros(qweight: QuantWeight) -> torch.Tensor | None:
    scheme = qweight.scheme
    if scheme.sym and _BITS[scheme.bits] != scheme.bits:  # whose middle is not that of the field
        return torch.full_like(qweight.scales, scheme.middle)
    return qweight.zeros


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> float32 [N / ROWS, groups, ROWS]"""
    rows = constant("ROWS")
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, -len(values) % rows))
    return padded.view(-1, rows, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: torch.Tensor, out_features: int) -> torch.Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out_features]


def weight_of_tensors(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: Scheme, shape: tuple[int, int]
) -> Weight:
    """What the kernels know of a weight; the tensors must outlive it."""
    pointers = codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr()
    bits, integer_inputs = _BITS[scheme.bits], scheme.activations is not None
    group_size = scheme.group_size if scheme.groups(shape[1]) > 1 else _width(shape[1], bits)
    return Weight(*pointers, bits, *shape, group_size, integer_inputs)


def _weight_of(buffers, scheme: Scheme, shape: tuple[int, int]) -> Weight:
    return weight_of_tensors(buffers["codes"], buffers["scales"], buffers.get("zeros"), scheme, shape)


def unpack(buffers, scheme: Scheme, shape: tuple[int, int]) -> QuantWeight:
    """The weight of shape (out_features, in_features) that `pack` made buffers of."""
    out_features, in_features = shape
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    library().lowbit_unpack(_weight_of(buffers, scheme, shape), 0, out_features, codes.data_ptr(), None)
    scales = _by_row(buffers["scales"], out_features).to(buffers["scales_like"].dtype)
    zeros = None if scheme.sym else _by_row(buffers["zeros"], out_features).to(torch.uint8)
    grid = {name: buffers[name] for name in input_grid(scheme)}
    return QuantWeight(codes, scales.contiguous(), scheme, zeros, **grid)


def dense_blocks(weight: Weight, dtype: torch.dtype):
    step = max(constant("ROWS"), dense.BLOCK_ELEMENTS // weight.in_features)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        block = torch.empty(stop - start, weight.in_features)
        library().lowbit_unpack(weight, start, stop, None, block.data_ptr())
        yield start, stop, block.to(dtype)


def _experts(x, codes, scales, zeros, input_scale, input_zero, bias, expert_start, scheme, out_features):
    bounds, tensors = expert_start.tolist(), (codes, scales, zeros, input_scale, input_zero, bias)
    y = x.new_zeros(x.shape[0], out_features)  # for the rows behind the last expert's
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            of_expert = (None if tensor is None else tensor[expert] for tensor in tensors)
            y[start:stop] = _linear(x[start:stop], *of_expert, scheme, out_features)
    return y


def _linear(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features):
    scheme, in_features = _parse(scheme), x.shape[1]
    weight = weight_of_tensors(codes, scales, zeros, scheme, (out_features, in_features))
    if scheme.activations is not None:
        y = _integer_product(x, weight, scheme, input_scale, input_zero)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    if _dense_is_faster(x):
        return dense.product(x, dense_blocks(weight, dense.gemm_dtype(x.dtype)), out_features, bias)
    stored = x.dtype if x.dtype in DTYPES else torch.float32
    y = torch.empty(len(x), out_features, dtype=stored)
    bias = None if bias is None else bias.to(stored)
    product(weight, x.to(stored).contiguous(), y, bias, PIECES[x.dtype])()
    return y.to(x.dtype)


def _dense_is_faster(x: torch.Tensor) -> bool:
    wide = dense.gemm_dtype(x.dtype) == torch.float32
    return len(x) * PIECES[x.dtype] >= (_CROSSOVER_FP32 if wide else _CROSSOVER_BF16)


def _integer_product(x, weight: Weight, scheme: Scheme, input_scale, input_zero) -> torch.Tensor:
    steps, scale, zero = quantize_input(x, scheme.activations, input_scale, input_zero)
    steps = steps.float() if zero is None else steps.float().sub_(zero)
    y = steps.new_empty(len(x), weight.out_features)
    for start in range(0, len(x), _ROWS_OF_INTEGERS):
        rows = slice(start, start + _ROWS_OF_INTEGERS)
        product(weight, steps[rows], y[rows], None, 1)()
    return y.mul_(scale)


def product(weight: Weight, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, pieces: int) -> Callable:
    """The call that computes y = x W^T + bias, all three contiguous and of one dtype of DTYPES; what `weight` points to
    must outlive it."""
    scratch = torch.empty(library().lowbit_linear_scratch(weight, len(x)), dtype=torch.uint8)
    pointers = x.data_ptr(), constant(DTYPES[x.dtype]), None if bias is None else bias.data_ptr(), y.data_ptr()
    call = partial(library().lowbit_linear, weight, *pointers, len(x), pieces, scratch.data_ptr())
    call.keeps = x, y, bias, scratch
    return call


def replay(y, x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features) -> Callable | None:
    """For those who repeat `linear_native` on tensors that stay where they are: the call that computes its result `y`
    anew, where that is one call of a kernel."""
    parsed, alike = _parse(scheme), bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    one_call = x.dtype in DTYPES and x.is_contiguous() and alike and not _dense_is_faster(x)
    if parsed.activations is not None or not one_call:
        return None
    weight = weight_of_tensors(codes, scales, zeros, parsed, (out_features, x.shape[1]))
    call = product(weight, x, y, bias, PIECES[x.dtype])
    call.keeps += (codes, scales, zeros)
    return call


def _grad_input(grad, codes, scales, zeros, scheme, in_features):
    weight = weight_of_tensors(codes, scales, zeros, _parse(scheme), (grad.shape[1], in_features))
    return dense.grad_input(grad, dense_blocks(weight, dense.gemm_dtype(grad.dtype)), in_features)


_parse = cache(Scheme.parse)
_library = torch.library.Library("lowbit", "FRAGMENT")
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros"
_library.define(
    f"linear_native(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? input_zero, Tensor? bias, str scheme, "
    "int out_features) -> Tensor"
)
_library.define(
    f"experts_native(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? input_zero, Tensor? bias, Tensor expert_start, "
    "str scheme, int out_features) -> Tensor"
)
_library.define(f"grad_input_native(Tensor grad, {_WEIGHT}, str scheme, int in_features) -> Tensor")
_library.impl("linear_native", _linear, "CPU")
_library.impl("experts_native", _experts, "CPU")
_library.impl("grad_input_native", _grad_input, "CPU")


@torch.library.register_fake("lowbit::linear_native", lib=_library)
def _(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit::experts_native", lib=_library)
def _(x, codes, scales, zeros, input_scale, input_zero, bias, expert_start, scheme, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit::grad_input_native", lib=_library)
def _(grad, codes, scales, zeros, scheme, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _keep_for_backward(ctx, inputs, output):
    x, codes, scales, zeros, *_, scheme, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.form = scheme, x.shape[1]


def _backward(ctx, grad):
    """Straight-through estimator: the gradient ignores that activations were rounded."""
    of_x = torch.ops.lowbit.grad_input_native(grad, *ctx.saved_tensors, *ctx.form)
    of_bias = grad.sum(0) if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, None, of_bias, None, None


def _keep_experts_for_backward(ctx, inputs, output):
    x, codes, scales, zeros, *_, expert_start, scheme, _ = inputs
    ctx.save_for_backward(codes, scales, zeros, expert_start)
    ctx.form = scheme, x.shape[1]


def _backward_of_experts(ctx, grad):
    *weight, expert_start = ctx.saved_tensors
    of_x, of_bias = grad.new_zeros(len(grad), ctx.form[1]), grad.new_zeros(len(weight[0]), grad.shape[1])
    for expert, (start, stop) in enumerate(pairwise(expert_start.tolist())):
        part, of_expert = grad[start:stop], (None if tensor is None else tensor[expert] for tensor in weight)
        of_x[start:stop] = torch.ops.lowbit.grad_input_native(part, *of_expert, *ctx.form)
        of_bias[expert] = part.sum(0)
    return of_x, None, None, None, None, None, of_bias if ctx.needs_input_grad[6] else None, None, None, None


torch.library.register_autograd("lowbit::linear_native", _backward, setup_context=_keep_for_backward, lib=_library)
torch.library.register_autograd(
    "lowbit::experts_native", _backward_of_experts, setup_context=_keep_experts_for_backward, lib=_library
)
