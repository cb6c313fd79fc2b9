"""Integer activations on CPUs: products of codes, summed exactly by the float32 GEMM.

Integer instructions would be the obvious way. Without VNNI there are none that are exact and fast: the AVX2 kernels of
oneDNN add pairs of products in 16 bits, which saturate (`onednn.qlinear_pointwise` gives half of 255 * -128 * K), and
`torch._int_mm` is a plain loop there. But float32 holds every integer up to 2^24, so a sum whose terms add up to less
is exact whatever the order. `prepare` finds out into how many parts the inputs have to be divided for that. Weights in
groups are scaled before they are multiplied, and rounded as float32 rounds.
"""

import torch

from lowbit.numerics.activations import quantize_input
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.scheme import Scheme

# Elements of a weight that are converted at a time: small enough to stay in cache until they are multiplied
_BLOCK_ELEMENTS = 2**20
# float32 holds all integers up to it
_EXACT = 2**24


def available():
    return None


def refuse(scheme, device, dtype, shape):
    if scheme.activations is None:
        return "multiplies integer inputs only"
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not on {torch.device(device).type}"
    return None


def prepare(qweight: QuantWeight):
    """Codes stay one byte each, whatever their bits. parts: int64 [], into how many the inputs are divided."""
    qweight.require_natural_order("int8_cpu")
    buffers = {"codes": qweight.codes, "scales": qweight.scales, "parts": torch.tensor(_parts(qweight))}
    if qweight.zeros is not None:
        buffers["zeros"] = qweight.zeros
    return buffers | {name: getattr(qweight, name) for name in input_grid(qweight.scheme)}


def restore(buffers, scheme, shape):
    return QuantWeight(**{name: tensor for name, tensor in buffers.items() if name != "parts"}, scheme=scheme)


def _parts(qweight: QuantWeight) -> int:
    """Into how many parts the inputs have to be divided for the products of a row in each to be summed exactly."""
    if _has_groups(qweight):
        return 1
    activations = qweight.scheme.activations
    largest = 2 ** (activations.bits - activations.sym)  # of a code less its zero point
    magnitudes = torch.cat([_steps(part).abs().to(torch.int16) for part in _rows(qweight)])
    parts = 1
    while any(int(part.sum(1).max()) * largest > _EXACT for part in magnitudes.chunk(parts, 1)):
        parts *= 2
    return parts


def _has_groups(qweight: QuantWeight) -> bool:
    return qweight.scales.shape[1] > 1


def _row_count(qweight: QuantWeight) -> int:
    return max(1, _BLOCK_ELEMENTS // qweight.in_features)


def _rows(qweight: QuantWeight):
    """The weight in slices of its outputs."""
    count = _row_count(qweight)
    for start in range(0, qweight.out_features, count):
        rows = slice(start, start + count)
        zeros = None if qweight.zeros is None else qweight.zeros[rows]
        yield QuantWeight(qweight.codes[rows], qweight.scales[rows], qweight.scheme.weight_only, zeros)


def _steps(qweight: QuantWeight) -> torch.Tensor:
    """float32 [N, K]: codes less their zero point, of a weight without groups."""
    return qweight.codes.float().sub_(qweight.scheme.middle if qweight.zeros is None else qweight.zeros)


def _product(x: torch.Tensor, qweight: QuantWeight, parts: int, bias: torch.Tensor | None) -> torch.Tensor:
    codes, scale, zero = quantize_input(x, qweight.scheme.activations, qweight.input_scale, qweight.input_zero)
    steps = codes.float() if zero is None else codes.float().sub_(zero)
    sums = []
    for rows in _rows(qweight):
        if _has_groups(qweight):
            sums.append(steps @ dequantize(rows, torch.float32).T)
        else:
            exact = _exact_product(steps, _steps(rows), parts)
            sums.append(exact.mul_(rows.scales.float().T))
    y = torch.cat(sums, 1).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _exact_product(steps: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """float32 [M, N]: the sum as int32 has it, rounded once."""
    if parts == 1:
        return steps @ weight.T
    pairs = zip(steps.chunk(parts, 1), weight.chunk(parts, 1), strict=True)
    return sum((first @ second.T).double() for first, second in pairs).float()


def linear(x, buffers, scheme, shape, bias=None):
    return torch.ops.lowbit.linear_int8_cpu(x, " ".join(buffers), list(buffers.values()), bias, scheme.name, shape[0])


@torch.library.custom_op("lowbit::linear_int8_cpu", mutates_args=())
def _linear_op(
    x: torch.Tensor, names: str, tensors: list[torch.Tensor], bias: torch.Tensor | None, scheme: str, out_features: int
) -> torch.Tensor:
    buffers = dict(zip(names.split(), tensors, strict=True))
    qweight = restore(buffers, Scheme.parse(scheme), (out_features, x.shape[1]))
    return _product(x, qweight, int(buffers["parts"]), bias)


@_linear_op.register_fake
def _(x, names, tensors, bias, scheme, out_features):
    return x.new_empty(x.shape[0], out_features)


def _keep_for_backward(ctx, inputs, output):
    x, names, tensors, _, scheme, out_features = inputs
    ctx.save_for_backward(*tensors)
    ctx.names, ctx.scheme, ctx.shape = names, Scheme.parse(scheme), (out_features, x.shape[1])


def _backward(ctx, grad):
    """Straight-through estimator: the gradient ignores that activations were rounded."""
    qweight = restore(dict(zip(ctx.names.split(), ctx.saved_tensors, strict=True)), ctx.scheme, ctx.shape)
    wide = grad.float()
    parts = zip(wide.split(_row_count(qweight), 1), _rows(qweight), strict=True)
    total = sum(part @ dequantize(rows, torch.float32) for part, rows in parts)
    of_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
    return total.to(grad.dtype), None, [None] * len(ctx.saved_tensors), of_bias, None, None


_linear_op.register_autograd(_backward, setup_context=_keep_for_backward)
