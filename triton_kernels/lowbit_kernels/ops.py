# SPDX-License-Identifier: Apache-2.0
"""The operators of torch: schemas, shapes for tracing, gradients for the input, and the kernels behind them.

    lowbit_kernels::linear    y = x W^T + bias
    lowbit_kernels::gate_up   y = SiLU(x Wg^T) * (x Wu^T), rows of both in turns of eight (layout.interleave_gate_up)
    lowbit_kernels::experts   rows of x sorted by expert, each times the matrix of its expert, + its bias [E, N]

`x` may have any leading dimensions, any strides, no rows at all. `dtype` is that of the packed scales, which the packed
tensors do not tell; x of another one is cast to it, and the result back. How many rows there are decides on the kernel
inside of the operator: a graph of torch.compile guards on nothing. Gradients go to a bias and, as LoRA wants it, to x,
by a dense copy made piece by piece.
"""

from itertools import pairwise

import torch

from lowbit_kernels import gemm, gemm_hopper, launching, skinny
from lowbit_kernels.int8 import ops as int8_ops
from lowbit_kernels.layout import Layout
from lowbit_kernels.tuning import select

_FORM = "int bits, int group_size, bool sym, ScalarType dtype, int out_features"
_library = torch.library.Library("lowbit_kernels", "DEF")
_library.define(f"linear(Tensor x, Tensor weight, Tensor meta, Tensor? bias, {_FORM}) -> Tensor")
_library.define(f"gate_up(Tensor x, Tensor weight, Tensor meta, {_FORM}) -> Tensor")
_library.define(f"experts(Tensor x, Tensor weight, Tensor meta, Tensor expert_start, Tensor? bias, {_FORM}) -> Tensor")
# In the gradients, out_features of the weight are those of grad
_GRAD_FORM = "int bits, int group_size, bool sym, ScalarType dtype, int in_features"
_library.define(f"grad_input(Tensor grad, Tensor weight, Tensor meta, {_GRAD_FORM}) -> Tensor")
_library.define(
    f"experts_grad_input(Tensor grad, Tensor weight, Tensor meta, Tensor expert_start, {_GRAD_FORM}) -> Tensor"
)

linear = torch.ops.lowbit_kernels.linear
gate_up = torch.ops.lowbit_kernels.gate_up
experts = torch.ops.lowbit_kernels.experts


def run(x: torch.Tensor, weight: torch.Tensor, meta: torch.Tensor, layout: Layout, bias, choice: select.Choice):
    """y [M, N] for x layout.dtype [M, K] by the kernel that `choice` names."""
    if choice.kernel == "int8":
        return int8_ops.run(x, weight, meta, layout, bias, choice.config)
    if choice.kernel == "hopper" and (reason := gemm_hopper.refusal(layout, choice.config, x)):
        choice = select.Choice(*select.rule(layout, len(x), select.gpu_of(x.device), without=("hopper",)), reason)
    if choice.kernel == "dense":
        return _dense(x, weight, meta, layout, bias, choice.config)
    launch = {"skinny": skinny.launch, "gemm": gemm.launch, "hopper": gemm_hopper.launch}[choice.kernel]
    return launch(x, weight, meta, layout, choice.config, bias=bias)


def _pieces(weight: torch.Tensor, meta: torch.Tensor, layout: Layout, chunk: int):
    """(rows, dense weight [rows, K] in layout.dtype), each of about `chunk` bytes."""
    step = max(64, chunk // (2 * layout.in_features) // 64 * 64)
    for start in range(0, layout.out_features, step):
        stop = min(start + step, layout.out_features)
        yield slice(start, stop), gemm.dequantize(weight, meta, layout, start=start, rows=stop - start)


def _dense(x, weight, meta, layout: Layout, bias, config: select.Dense) -> torch.Tensor:
    y = x.new_empty(len(x), layout.out_features)
    for rows, piece in _pieces(weight, meta, layout, config.chunk):
        torch.mm(x, piece.T, out=y[:, rows])
    return y if bias is None else y.add_(bias)


def _rows(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x as [M, K] in the dtype of the kernel, each row in one piece."""
    x = x.reshape(-1, x.shape[-1]).to(layout.dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _linear(x, weight, meta, bias, bits, group_size, sym, dtype, out_features):
    layout = Layout(bits, group_size, sym, dtype, out_features, x.shape[-1])
    rows = _rows(x, layout)
    if len(rows):
        bias = None if bias is None else bias.to(layout.dtype)
        y = run(rows, weight, meta, layout, bias, select.choose(layout, len(rows), x.device))
    else:
        y = rows.new_empty(0, out_features)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def _gate_up(x, weight, meta, bits, group_size, sym, dtype, out_features):
    layout = Layout(bits, group_size, sym, dtype, out_features, x.shape[-1])
    rows = _rows(x, layout)
    if len(rows) <= select.SKINNY_ROWS:
        gpu = select.gpu_of(x.device)
        config = skinny.default_config(layout, len(rows), 4 * gpu.processors, gpu.capability)
        y = skinny.launch(rows, weight, meta, layout, config, gate_up=True)
    else:
        config = gemm.default_config(layout, len(rows), launching.most_warps(select.gpu_of(x.device).capability))
        y = gemm.launch(rows, weight, meta, layout, config, gate_up=True)
    return y.view(*x.shape[:-1], out_features // 2).to(x.dtype)


def _experts(x, weight, meta, expert_start, bias, bits, group_size, sym, dtype, out_features):
    """expert_start int32 [E + 1]: expert e has the rows [expert_start[e], expert_start[e + 1]). Rows that come after
    those of the last, as expert parallelism leaves the rows of other machines' experts, give zeros."""
    layout = Layout(bits, group_size, sym, dtype, out_features, x.shape[-1])
    rows = _rows(x, layout)
    y = rows.new_zeros(len(rows), out_features)
    if len(rows):
        bias = None if bias is None else bias.to(layout.dtype)
        config = select.choose_for_experts(layout, len(rows), len(weight), x.device).config
        tiles = skinny.expert_tiles(expert_start, len(rows), config.block_m)
        skinny.launch_experts(rows, weight, meta, layout, config, tiles, bias=bias, out=y)
    return y.to(x.dtype)


def _grad_input(grad, weight, meta, bits, group_size, sym, dtype, in_features):
    """grad [..., N] @ W [N, K], summed in float32 over pieces of W."""
    layout = Layout(bits, group_size, sym, dtype, grad.shape[-1], in_features)
    rows = grad.reshape(-1, layout.out_features).to(layout.dtype)
    total = torch.zeros(len(rows), in_features, dtype=torch.float32, device=grad.device)
    for part, piece in _pieces(weight, meta, layout, select.Dense().chunk):
        total += rows[:, part] @ piece
    return total.view(*grad.shape[:-1], in_features).to(grad.dtype)


def _experts_grad_input(grad, weight, meta, expert_start, bits, group_size, sym, dtype, in_features):
    total = grad.new_zeros(len(grad), in_features)
    bounds = expert_start.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            part = _grad_input(
                grad[start:stop], weight[expert], meta[expert], bits, group_size, sym, dtype, in_features
            )
            total[start:stop] = part
    return total


for _name, _function in (
    ("linear", _linear),
    ("gate_up", _gate_up),
    ("experts", _experts),
    ("grad_input", _grad_input),
    ("experts_grad_input", _experts_grad_input),
):
    # also on the CPU, where triton's interpreter runs the kernels
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("lowbit_kernels::linear", lib=_library)
def _(x, weight, meta, bias, bits, group_size, sym, dtype, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("lowbit_kernels::gate_up", lib=_library)
def _(x, weight, meta, bits, group_size, sym, dtype, out_features):
    return x.new_empty(*x.shape[:-1], out_features // 2)


@torch.library.register_fake("lowbit_kernels::experts", lib=_library)
def _(x, weight, meta, expert_start, bias, bits, group_size, sym, dtype, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("lowbit_kernels::grad_input", lib=_library)
def _(grad, weight, meta, bits, group_size, sym, dtype, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.register_fake("lowbit_kernels::experts_grad_input", lib=_library)
def _(grad, weight, meta, expert_start, bits, group_size, sym, dtype, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _keep(ctx, inputs, output):
    """What gradients need: the weight is read again, and by those of gate_up x is too."""
    x, *tensors, bits, group_size, sym, dtype, out_features = inputs
    ctx.save_for_backward(x, *tensors)
    ctx.form, ctx.out_features, ctx.in_features = (bits, group_size, sym, dtype), out_features, x.shape[-1]


def _linear_backward(ctx, grad):
    _, weight, meta, _ = ctx.saved_tensors
    of_x = torch.ops.lowbit_kernels.grad_input(grad, weight, meta, *ctx.form, ctx.in_features)
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias, *[None] * 5


def _gate_up_backward(ctx, grad):
    x, weight, meta = ctx.saved_tensors
    both = linear(x, weight, meta, None, *ctx.form, ctx.out_features)
    gate, up = both.float().unflatten(-1, (-1, 2, 8)).unbind(-2)
    grad = grad.float().unflatten(-1, (-1, 8))
    sigmoid = gate.sigmoid()
    parts = [grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid]
    of_both = torch.stack(parts, -2).flatten(-3).to(x.dtype)
    return torch.ops.lowbit_kernels.grad_input(of_both, weight, meta, *ctx.form, ctx.in_features), *[None] * 7


def _experts_backward(ctx, grad):
    _, weight, meta, start, _ = ctx.saved_tensors
    of_x = torch.ops.lowbit_kernels.experts_grad_input(grad, weight, meta, start, *ctx.form, ctx.in_features)
    of_bias = None
    if ctx.needs_input_grad[4]:
        expert = torch.searchsorted(start[1:], torch.arange(len(grad), device=grad.device), right=True)
        # one more, for rows that are no expert's
        of_bias = grad.new_zeros(len(start), grad.shape[-1]).index_add(0, expert, grad)[:-1]
    return of_x, None, None, None, of_bias, *[None] * 5


for _name, _backward in (("linear", _linear_backward), ("gate_up", _gate_up_backward), ("experts", _experts_backward)):
    torch.library.register_autograd(f"lowbit_kernels::{_name}", _backward, setup_context=_keep, lib=_library)
