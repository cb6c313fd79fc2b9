"""The definition of a quantized linear, in plain torch: what every backend must equal."""

import torch

from lowbit.numerics.activations import quantize_input
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight


def linear(x: torch.Tensor, qweight: QuantWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features], in x.dtype.

    Through the dequantized weight where inputs stay in floating point. Else in integers: the products of codes are
    summed as int32 would, group by group, and scaled in float32. Gradients pass the rounding of inputs by.
    """
    if qweight.scheme.activations is None:
        return torch.nn.functional.linear(x, dequantize(qweight, x.dtype), bias)
    y = _Integers.apply(x, qweight)
    return (y if bias is None else y + bias.float()).to(x.dtype)


class _Integers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qweight):
        ctx.qweight = qweight
        return integer_product(x, qweight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(ctx.qweight, grad.dtype), None


def integer_product(x: torch.Tensor, qweight: QuantWeight) -> torch.Tensor:
    """x [..., K] -> float32 [..., N] of a QuantWeight without g_idx, before the bias."""
    scheme, (out_features, in_features) = qweight.scheme, qweight.codes.shape
    assert scheme.activations is not None, "the inputs of this scheme are no integers"
    codes, scale, zero = quantize_input(x, scheme.activations, qweight.input_scale, qweight.input_zero)
    # float64 holds every sum of such integers, and multiplies on all devices
    steps = codes.double() if zero is None else codes.double() - zero
    zeros = scheme.middle if qweight.zeros is None else qweight.zeros.double().unsqueeze(-1)
    weight = qweight.codes.double().view(out_features, scheme.groups(in_features), -1) - zeros
    y = scale.new_zeros(*x.shape[:-1], out_features)
    for group, part in enumerate(steps.split(weight.shape[-1], -1)):
        y += (part @ weight[:, group].T).float() * qweight.scales[:, group].float()
    return y * scale


# Rows looked at for the error of a layer: enough for three digits, and far cheaper than the quantization itself
_SAMPLED_ROWS = 64


def weight_error(weight: torch.Tensor, qweight: QuantWeight) -> float:
    """Relative error ||W - Q|| / ||W|| over evenly spaced rows."""
    step = max(1, weight.shape[0] // _SAMPLED_ROWS)
    rows = weight[::step].float()
    sampled = QuantWeight(
        qweight.codes[::step],
        qweight.scales[::step],
        qweight.scheme.weight_only,
        None if qweight.zeros is None else qweight.zeros[::step],
    )
    difference = dequantize(sampled, torch.float32).sub_(rows)
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(rows).clamp_min(1e-30))
