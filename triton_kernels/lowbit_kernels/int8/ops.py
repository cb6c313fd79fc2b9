# SPDX-License-Identifier: Apache-2.0
"""The operators of torch for integer inputs, beside those of `ops`.

    lowbit_kernels::int8_linear     y = Q(x) W^T + bias, each row of x quantized to eight bits
    lowbit_kernels::quantize_rows   Q alone, of x or of RMSNorm(x): [codes, scales], and zeros unless sym
    lowbit_kernels::int8_matmul     the product alone, for several weights that share a quantized x

`x` may have any leading dimensions and strides. Gradients of int8_linear go to a bias and, past the rounding, to x.
"""

import torch

from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8 import quantize
from lowbit_kernels.int8.layout import TILE, Int8Layout
from lowbit_kernels.tuning import select

_library = torch.library.Library("lowbit_kernels", "FRAGMENT")
_library.define(
    "int8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? sums, Tensor? bias, Tensor? static_scale, "
    "Tensor? static_zero, int bits, int group_size, int out_features) -> Tensor"
)
_library.define(
    "quantize_rows(Tensor x, bool sym, Tensor? static_scale, Tensor? static_zero, Tensor? norm_weight, float eps) "
    "-> Tensor[]"
)
_library.define(
    "int8_matmul(Tensor codes, Tensor x_scales, Tensor? x_zeros, Tensor weight, Tensor scales, Tensor? sums, "
    "Tensor? bias, int bits, int group_size, ScalarType dtype, int out_features, int in_features) -> Tensor"
)
_library.define(
    "int8_grad_input(Tensor grad, Tensor weight, Tensor scales, int bits, int group_size, int in_features) -> Tensor"
)

int8_linear = torch.ops.lowbit_kernels.int8_linear
quantize_rows = torch.ops.lowbit_kernels.quantize_rows
int8_matmul = torch.ops.lowbit_kernels.int8_matmul


def run(x, weight, scales, layout: Int8Layout, bias, config: int8.Config, sums=None, static=(None, None)):
    """y [M, N] for x layout.dtype [M, K]; sums where rows are asymmetric, static: scale and zero point of all rows."""
    codes, x_scales, x_zeros = quantize.rows(x, sym=sums is None, static_scale=static[0], static_zero=static[1])
    return int8.launch(
        codes, x_scales, weight, scales, layout, config, x_zeros=x_zeros, sums=sums, bias=bias
    )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M, K], each row in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _int8_linear(x, weight, scales, sums, bias, static_scale, static_zero, bits, group_size, out_features):
    layout = Int8Layout(bits, group_size, x.dtype, out_features, x.shape[-1])
    rows = _rows(x)
    bias = None if bias is None else bias.to(layout.dtype)
    config = select.choose(layout, len(rows), x.device).config
    y = run(rows, weight, scales, layout, bias, config, sums, (static_scale, static_zero))
    return y.view(*x.shape[:-1], out_features)


def _quantize_rows(x, sym, static_scale, static_zero, norm_weight, eps):
    codes, *grid = quantize.rows(
        _rows(x), sym=sym, static_scale=static_scale, static_zero=static_zero, norm_weight=norm_weight, eps=eps
    )
    return [codes.view(*x.shape[:-1], -1), *(part.view(x.shape[:-1]) for part in grid if part is not None)]


def _int8_matmul(
    codes, x_scales, x_zeros, weight, scales, sums, bias, bits, group_size, dtype, out_features, in_features
):
    layout = Int8Layout(bits, group_size, dtype, out_features, in_features)
    leading, codes = codes.shape[:-1], codes.reshape(-1, codes.shape[-1])
    x_zeros = None if x_zeros is None else x_zeros.reshape(-1)
    config = select.choose(layout, len(codes), codes.device).config
    y = int8.launch(
        codes, x_scales.reshape(-1), weight, scales, layout, config, x_zeros=x_zeros, sums=sums, bias=bias
    )  # fmt: skip
    return y.view(*leading, out_features)


def _int8_grad_input(grad, weight, scales, bits, group_size, in_features):
    """grad [..., N] @ W [N, K]"""
    layout = Int8Layout(bits, group_size, grad.dtype, grad.shape[-1], in_features)
    return grad @ int8_layout.dequantize(weight, scales, layout)


for _name, _function in (
    ("int8_linear", _int8_linear),
    ("quantize_rows", _quantize_rows),
    ("int8_matmul", _int8_matmul),
    ("int8_grad_input", _int8_grad_input),
):
    # also on the CPU, where triton's interpreter runs the kernels
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("lowbit_kernels::int8_linear", lib=_library)
def _(x, weight, scales, sums, bias, static_scale, static_zero, bits, group_size, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("lowbit_kernels::quantize_rows", lib=_library)
def _(x, sym, static_scale, static_zero, norm_weight, eps):
    codes = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // TILE) * TILE, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return [codes, scales] if sym else [codes, scales, torch.empty_like(scales, dtype=torch.int8)]


@torch.library.register_fake("lowbit_kernels::int8_matmul", lib=_library)
def _(codes, x_scales, x_zeros, weight, scales, sums, bias, bits, group_size, dtype, out_features, in_features):
    return codes.new_empty(*codes.shape[:-1], out_features, dtype=dtype)


@torch.library.register_fake("lowbit_kernels::int8_grad_input", lib=_library)
def _(grad, weight, scales, bits, group_size, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


def _keep(ctx, inputs, output):
    x, weight, scales, *_, bits, group_size, _ = inputs
    ctx.save_for_backward(weight, scales)
    ctx.form = bits, group_size, x.shape[-1]


def _backward(ctx, grad):
    weight, scales = ctx.saved_tensors
    of_x = torch.ops.lowbit_kernels.int8_grad_input(grad, weight, scales, *ctx.form)
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return of_x, None, None, None, of_bias, *[None] * 5


torch.library.register_autograd("lowbit_kernels::int8_linear", _backward, setup_context=_keep, lib=_library)
