"""Kernels in C for the CPU, compiled on the machine they run on (build.py); kernels.c says what they compute.

Few rows are multiplied by the packed weight as it is, many by a dense copy, made block by block. Integer activations
are integers to the kernels already, and always theirs. 3-bit codes are stored in 4 bits: taking three from words costs
more time than reading a bit more.
"""

from functools import cache
from itertools import pairwise

import torch

from lowbit.backends import dense
from lowbit.backends.native.build import Weight, library
from lowbit.qweight import QuantWeight, input_grid
from lowbit.ranges import quantize_input
from lowbit.scheme import Scheme

# As in kernels.c
_ROWS, _LANES, _STEP = 4, 16, 256  # a step of integer inputs is longer: there are fewer
_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
# 16-bit integers that stand for an input
_PIECES = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}
# From how many rows on dequantize + GEMM wins; see scripts/benchmarks/cpu_linear.py
_CROSSOVER_BF16, _CROSSOVER_FP32 = 16, 48
# Rows of integers that the kernels go through at a time: more would not stay in the cache of a core
_ROWS_OF_INTEGERS = 64


def available() -> str | None:
    found = library()
    return found if isinstance(found, str) else None


def refuse(scheme, device, dtype, shape):
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not on {torch.device(device).type}"
    if dtype not in _PIECES:
        return f"runs {', '.join(str(known).removeprefix('torch.') for known in _PIECES)}, not {dtype}"
    return available()


def _chunk(bits: int) -> int:
    return 16 // bits * _LANES


def _width(in_features: int, bits: int) -> int:
    """in_features in whole chunks."""
    return -(-in_features // _chunk(bits)) * _chunk(bits)


def prepare(qweight: QuantWeight):
    qweight.require_natural_order("native")
    bits, (out_features, in_features) = _BITS[qweight.scheme.bits], qweight.codes.shape
    blocks = -(-out_features // _ROWS)
    codes = torch.zeros(blocks, _width(in_features, bits) // _chunk(bits), _ROWS, _LANES, dtype=torch.int16)
    # scales_like, without elements: for `restore` to know the dtype
    buffers = {"codes": codes, "scales": _by_block(qweight.scales), "scales_like": qweight.scales.new_empty(0)}
    zeros = _zeros(qweight)
    if zeros is not None:
        buffers["zeros"] = _by_block(zeros)
    buffers |= {name: getattr(qweight, name) for name in input_grid(qweight.scheme)}
    source = qweight.codes.contiguous()
    weight = _weight_of(buffers, qweight.scheme, qweight.codes.shape)
    library().lowbit_pack(weight, source.data_ptr(), codes.data_ptr())
    return buffers


def _zeros(qweight: QuantWeight) -> torch.Tensor | None:
    if qweight.scheme.bits == 3 and qweight.scheme.sym:  # whose middle is not that of four bits
        return torch.full_like(qweight.scales, qweight.scheme.middle)
    return qweight.zeros


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> float32 [N / ROWS, groups, ROWS]"""
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, -len(values) % _ROWS))
    return padded.view(-1, _ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: torch.Tensor, out_features: int) -> torch.Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:out_features]


def _weight(codes, scales, zeros, scheme: Scheme, shape: tuple[int, int]) -> Weight:
    """What the kernels know of a weight; the tensors must outlive it."""
    pointers = codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr()
    bits, integer_inputs = _BITS[scheme.bits], scheme.activations is not None
    group_size = scheme.group_size if scheme.groups(shape[1]) > 1 else _width(shape[1], bits)
    return Weight(*pointers, bits, *shape, group_size, integer_inputs)


def _weight_of(buffers, scheme: Scheme, shape: tuple[int, int]) -> Weight:
    return _weight(buffers["codes"], buffers["scales"], buffers.get("zeros"), scheme, shape)


def restore(buffers, scheme, shape):
    out_features, in_features = shape
    codes = torch.empty(out_features, in_features, dtype=torch.uint8)
    library().lowbit_unpack(_weight_of(buffers, scheme, shape), 0, out_features, codes.data_ptr(), None)
    scales = _by_row(buffers["scales"], out_features).to(buffers["scales_like"].dtype)
    zeros = None if scheme.sym else _by_row(buffers["zeros"], out_features).to(torch.uint8)
    grid = {name: buffers[name] for name in input_grid(scheme)}
    return QuantWeight(codes, scales.contiguous(), scheme, zeros, **grid)


def _blocks(weight: Weight, dtype: torch.dtype):
    step = max(_ROWS, dense.BLOCK_ELEMENTS // weight.in_features)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        block = torch.empty(stop - start, weight.in_features)
        library().lowbit_unpack(weight, start, stop, None, block.data_ptr())
        yield start, stop, block.to(dtype)


def linear(x, buffers, scheme, shape, bias=None):
    optional = (buffers.get(name) for name in ("zeros", "input_scale", "input_zero"))
    return torch.ops.lowbit.linear_native(
        x, buffers["codes"], buffers["scales"], *optional, bias, scheme.name, shape[0]
    )


def experts(x, buffers, expert_start, scheme, shape, bias=None):
    bounds, y = [start.item() for start in expert_start], []  # not tolist, which what records operators does not see
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            of_expert = {name: tensor[expert] for name, tensor in buffers.items()}
            part = None if bias is None else bias[expert]
            y.append(linear(x[start:stop], of_expert, scheme, shape[1:], part))
    return torch.cat([*y, x.new_zeros(x.shape[0] - bounds[-1], shape[1])])


def _linear(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features):
    scheme, in_features = _parse(scheme), x.shape[1]
    weight = _weight(codes, scales, zeros, scheme, (out_features, in_features))
    if scheme.activations is not None:
        y = _integer_product(x, weight, scheme, input_scale, input_zero)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    crossover = _CROSSOVER_FP32 if dense.gemm_dtype(x.dtype) == torch.float32 else _CROSSOVER_BF16
    if len(x) >= crossover:
        return dense.product(x, _blocks(weight, dense.gemm_dtype(x.dtype)), out_features, bias)
    wide = torch.empty(x.shape).copy_(x)
    y = wide.new_zeros(len(x), out_features)
    _add_product(weight, wide, y, _PIECES[x.dtype])
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _integer_product(x, weight: Weight, scheme: Scheme, input_scale, input_zero) -> torch.Tensor:
    steps, scale, zero = quantize_input(x, scheme.activations, input_scale, input_zero)
    steps = steps.float() if zero is None else steps.float().sub_(zero)
    y = steps.new_zeros(len(x), weight.out_features)
    for start in range(0, len(x), _ROWS_OF_INTEGERS):
        rows = slice(start, start + _ROWS_OF_INTEGERS)
        _add_product(weight, steps[rows], y[rows], 1)
    return y.mul_(scale)


def _add_product(weight: Weight, x: torch.Tensor, y: torch.Tensor, pieces: int) -> None:
    """y += x W^T, float32 both; x is used up."""
    steps = -(-weight.in_features // min(weight.group_size, _STEP))
    bytes_of_row = 2 * _width(weight.in_features, weight.bits) + 36 * steps
    scratch = torch.empty(len(x) * bytes_of_row, dtype=torch.uint8)
    if not library().lowbit_linear(weight, x.data_ptr(), y.data_ptr(), len(x), pieces, scratch.data_ptr()):
        raise AssertionError(f"there is no kernel for {weight.bits} bits in groups of {weight.group_size}")


def _grad_input(grad, codes, scales, zeros, scheme, in_features):
    weight = _weight(codes, scales, zeros, _parse(scheme), (grad.shape[1], in_features))
    return dense.grad_input(grad, _blocks(weight, dense.gemm_dtype(grad.dtype)), in_features)


_parse = cache(Scheme.parse)
_library = torch.library.Library("lowbit", "FRAGMENT")
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros"
_library.define(
    f"linear_native(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? input_zero, Tensor? bias, str scheme, "
    "int out_features) -> Tensor"
)
_library.define(f"grad_input_native(Tensor grad, {_WEIGHT}, str scheme, int in_features) -> Tensor")
_library.impl("linear_native", _linear, "CPU")
_library.impl("grad_input_native", _grad_input, "CPU")


@torch.library.register_fake("lowbit::linear_native", lib=_library)
def _(x, codes, scales, zeros, input_scale, input_zero, bias, scheme, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit::grad_input_native", lib=_library)
def _(grad, codes, scales, zeros, scheme, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _keep_for_backward(ctx, inputs, output):
    x, codes, scales, zeros, *_, scheme, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.form = scheme, x.shape[1]


def _backward(ctx, grad):
    """Past the rounding of inputs, as if they had stayed in floating point."""
    of_x = torch.ops.lowbit.grad_input_native(grad, *ctx.saved_tensors, *ctx.form)
    of_bias = grad.sum(0) if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, None, of_bias, None, None


torch.library.register_autograd("lowbit::linear_native", _backward, setup_context=_keep_for_backward, lib=_library)
