"""torch's own packed-weight CPU kernels: `_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm`.

Few rows go to the packed kernel, which reads a quarter (or half) of the bytes of a bf16 weight. Many rows go through a
dequantized copy, made block by block, and the machine's best dense GEMM: the packed kernels pay the dequantization once
for every few rows.

2 and 3 bits run on the int4 kernel with their codes shifted to the middle of its range; groups of a multiple of 32
(and whole rows) run as several groups with one scale. 8 bits with groups run as two int4 kernels, one for each nibble:
c = 16 h + l  =>  (c - 128) s = [(h - 8) 16 s + 8 s] + (l - 8) s. The constant goes with the high nibble: with the low
one, both halves would be large and cancel for inputs that have a mean, and bf16 would lose what is left.
"""

from functools import cache

import torch

from lowbit.numerics import dense
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import PER_CHANNEL, Scheme

_OP_GROUPS = (256, 128, 64, 32)
# The kernels work on whole vectors of the widest instruction set and do not check their bounds: bf16 int8pack with
# in_features off a multiple of 16 reads past the row and returned inf on AVX2 (torch 2.13)
_IN_MULTIPLE, _OUT_MULTIPLE = 32, 16
# From how many rows on dequantize + GEMM wins, measured on 4096 x 4096: with bf16 instructions (Zen 5) the GEMM is fast
# early; without them (AVX2) the float32 GEMM must carry the conversion too. See scripts/benchmarks/cpu_linear.py.
_CROSSOVER_BF16, _CROSSOVER_FP32 = 16, 96


@cache
def available() -> str | None:
    """Whether this torch has the kernels and packs int4 in the order this file knows; probed once."""
    operators = torch.ops.aten
    for name in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
        if not hasattr(operators, name):
            return f"torch {torch.__version__} has no {name}"
    if _block_rows() is None:
        return f"torch {torch.__version__} packs int4 in an unknown order on this CPU"
    return None


@cache
def _block_rows() -> int | None:
    """Rows in one block of the int4 layout: 64 with AVX-512, 32 with AVX2; None if no known layout fits."""
    probe = (torch.arange(160 * 32, dtype=torch.int64) * 7919 % 16).to(torch.int32).view(160, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    for rows in (64, 32, 16, 128):
        if torch.equal(_unpack_int4(packed, 160, 32, rows), probe.to(torch.uint8)):
            return rows
    return None


def refuse(scheme, device, dtype, shape):
    if scheme.activations is not None:
        return "multiplies inputs in floating point only"
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not on {torch.device(device).type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"runs bfloat16 and float16, not {dtype} (load with dtype='bfloat16' for speed)"
    if reason := available():
        return reason
    out_features, in_features = shape
    if in_features % _IN_MULTIPLE or out_features % _OUT_MULTIPLE:
        return (
            f"in_features {in_features} and out_features {out_features} must be multiples of {_IN_MULTIPLE} and "
            f"{_OUT_MULTIPLE}"
        )
    if scheme.group_of(in_features) % _OP_GROUPS[-1]:
        return f"group_size {scheme.group_size} is not a multiple of {_OP_GROUPS[-1]}"
    if scheme.bits in (5, 6):
        return f"{scheme.bits} bits do not fit the int4 kernel, and are too few to be worth two of them"
    if scheme.bits == 8 and not scheme.sym:
        return "8-bit asymmetric weights do not fit the int4 and int8 kernels"
    return None


def _op_group(group: int) -> int:
    return next(size for size in _OP_GROUPS if group % size == 0)


def _pack_int4(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


def _unpack_int4(packed: torch.Tensor, out_features: int, in_features: int, rows: int) -> torch.Tensor:
    """uint8 [N, K] codes. A block of `rows` outputs is stored input by input, output j beside output j + rows/2; the
    outputs that do not fill a block are stored in neighbouring pairs."""
    flat = packed.reshape(-1)
    full = out_features // rows
    blocks = flat[: full * rows * in_features // 2].view(full, in_features, rows // 2)
    codes = torch.cat([blocks & 15, blocks >> 4], dim=2).transpose(1, 2).reshape(full * rows, in_features)
    tail = flat[full * rows * in_features // 2 :].view(in_features, -1)
    return torch.cat([codes, torch.stack([tail & 15, tail >> 4], dim=2).view(in_features, -1).T])


def _scales_and_zeros(scales: torch.Tensor, offset: torch.Tensor | float, repeat: int) -> torch.Tensor:
    """[G * repeat, N, 2] of (scale, offset): the kernel computes (code - 8) * scale + offset."""
    offset = torch.as_tensor(offset, dtype=torch.float32).expand(scales.shape).to(scales.dtype)
    return torch.stack([scales, offset], dim=2).repeat_interleave(repeat, dim=1).transpose(0, 1).contiguous()


def prepare(qweight: QuantWeight):
    qweight.require_natural_order("torch_cpu")
    scheme, scales = qweight.scheme, qweight.scales
    group = scheme.group_of(qweight.in_features)
    repeat = group // _op_group(group)
    # `scales` itself is kept beside the kernel's copy: it is small, and makes `restore` exact
    buffers = {"scales": scales}
    if scheme.bits == 8 and scheme.group_size == PER_CHANNEL:
        return buffers | {"int8": (qweight.codes ^ 128).contiguous().view(torch.int8)}
    if scheme.bits == 8:
        wide = scales.float()
        return buffers | {
            "int4_high": _pack_int4(qweight.codes >> 4),
            "int4_low": _pack_int4(qweight.codes & 15),
            "scales_high": _scales_and_zeros((wide * 16).to(scales.dtype), wide * 8, repeat),
            "scales_low": _scales_and_zeros(scales, 0.0, repeat),
        }
    shift = 8 - scheme.middle
    buffers["int4"] = _pack_int4(qweight.codes + shift)
    offset = 0.0
    if qweight.zeros is not None:
        buffers["zeros"] = qweight.zeros
        offset = (scheme.middle - qweight.zeros.float()) * scales.float()
    buffers["scales_and_zeros"] = _scales_and_zeros(scales, offset, repeat)
    return buffers


def _keys(scheme) -> tuple[str, ...]:
    """The buffers of a scheme, in the order in which the operator takes them."""
    if scheme.bits == 8 and scheme.group_size == PER_CHANNEL:
        return ("scales", "int8")
    if scheme.bits == 8:
        return ("scales", "int4_high", "int4_low", "scales_high", "scales_low")
    return ("scales", "int4", "scales_and_zeros") if scheme.sym else ("scales", "int4", "scales_and_zeros", "zeros")


def restore(buffers, scheme, shape):
    return _restore_rows(buffers, scheme, shape, 0, shape[0])


def _restore_rows(buffers, scheme, shape, start: int, stop: int) -> QuantWeight:
    """Rows [start, stop) as a QuantWeight; start must begin a block of the int4 layout."""
    in_features = shape[1]

    def int4(name):
        part = buffers[name].view(-1)[start * in_features // 2 : stop * in_features // 2]
        return _unpack_int4(part, stop - start, in_features, _block_rows())

    if "int8" in buffers:
        codes = buffers["int8"][start:stop].view(torch.uint8) ^ 128
    elif "int4_high" in buffers:
        codes = (int4("int4_high") << 4) | int4("int4_low")
    else:
        codes = int4("int4") - (8 - scheme.middle)
    zeros = buffers["zeros"][start:stop] if "zeros" in buffers else None
    return QuantWeight(codes, buffers["scales"][start:stop], scheme, zeros)


def _packed(x, buffers, scheme, shape):
    """The kernels of torch; x [M, K] contiguous."""
    operators = torch.ops.aten
    if "int8" in buffers:
        return operators._weight_int8pack_mm(x, buffers["int8"], buffers["scales"].view(-1))
    group = _op_group(scheme.group_of(shape[1]))
    if "int4_high" in buffers:
        high = operators._weight_int4pack_mm_for_cpu(x, buffers["int4_high"], group, buffers["scales_high"])
        return high + operators._weight_int4pack_mm_for_cpu(x, buffers["int4_low"], group, buffers["scales_low"])
    return operators._weight_int4pack_mm_for_cpu(x, buffers["int4"], group, buffers["scales_and_zeros"])


def _blocks(buffers, scheme, shape, dtype):
    """(start, stop, dense [stop - start, K] in dtype) over the outputs."""
    out_features, in_features = shape
    rows = max(_block_rows(), dense.BLOCK_ELEMENTS // in_features // _block_rows() * _block_rows())
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        yield start, stop, dequantize(_restore_rows(buffers, scheme, shape, start, stop), dtype)


def linear(x, buffers, scheme, shape, bias=None):
    tensors = [buffers[name] for name in _keys(scheme)]
    return torch.ops.lowbit.linear_torch_cpu(x, tensors, bias, scheme.bits, scheme.group_size, scheme.sym, shape[0])


@torch.library.custom_op("lowbit::linear_torch_cpu", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    sym: bool,
    out_features: int,
) -> torch.Tensor:
    scheme, shape = Scheme(bits, group_size, sym), (out_features, x.shape[1])
    buffers = dict(zip(_keys(scheme), tensors, strict=True))
    if not x.shape[0]:
        return x.new_empty(0, out_features)
    crossover = _CROSSOVER_FP32 if dense.gemm_dtype(x.dtype) == torch.float32 else _CROSSOVER_BF16
    x = x.contiguous()
    if x.shape[0] >= crossover:
        return dense.product(x, _blocks(buffers, scheme, shape, dense.gemm_dtype(x.dtype)), out_features, bias)
    y = _packed(x, buffers, scheme, shape)
    return y if bias is None else y.add_(bias)  # the packed kernels take none: its addition rounds once more


@_linear_op.register_fake
def _(x, tensors, bias, bits, group_size, sym, out_features):
    return x.new_empty(x.shape[0], out_features)


def _keep_for_backward(ctx, inputs, output):
    x, tensors, _, bits, group_size, sym, out_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.scheme, ctx.shape = Scheme(bits, group_size, sym), (out_features, x.shape[1])


def _backward(ctx, grad):
    buffers = dict(zip(_keys(ctx.scheme), ctx.saved_tensors, strict=True))
    blocks = _blocks(buffers, ctx.scheme, ctx.shape, dense.gemm_dtype(grad.dtype))
    of_x = dense.grad_input(grad, blocks, ctx.shape[1])
    of_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
    return of_x, [None] * len(ctx.saved_tensors), of_bias, None, None, None, None


_linear_op.register_autograd(_backward, setup_context=_keep_for_backward)
