"""The kernels of `lowbit_kernels` for integer inputs: rows of x to eight bits, products on the integer tensor cores."""

from functools import cache

import torch

from lowbit.backends import triton
from lowbit.errors import first_line
from lowbit.numerics.qweight import QuantWeight, input_grid

available = triton.available
# The trial of a GPU: rows for few and for many, a weight, and far more error than rounding makes
_TRIAL_ROWS, _TRIAL_SHAPE, _TRIAL_ERROR = (1, 65), (64, 512), 2e-2


@cache
def _trial(bits: int, group_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels are not to be trusted on `device`, or None: small products are compared with plain torch."""
    from lowbit_kernels import reference
    from lowbit_kernels.int8 import ops as int8_ops
    from lowbit_kernels.int8.layout import Int8Layout
    from lowbit_kernels.tuning import select
    from lowbit_kernels.tuning.tune import packed, random_weight

    layout = Int8Layout(bits, group_size, dtype, *_TRIAL_SHAPE)
    weight = random_weight(layout, device)
    stored = packed(weight, layout)
    for rows in _TRIAL_ROWS:
        x = torch.randn(rows, layout.in_features, device=device).to(dtype)
        wanted = reference.int8_linear(*reference.quantize_rows(x), *weight[:2], bits)
        try:
            y = int8_ops.run(x, *stored, layout, None, select.choose(layout, rows, device).config)
        except Exception as error:  # of a compiler or a driver: whatever it is, there is another backend
            return f"its kernels fail on {device}: {type(error).__name__}: {first_line(error)}"
        error = float((y.float() - wanted).norm() / wanted.norm())
        if not error < _TRIAL_ERROR:
            return f"its kernels compute something else on {device}: relative error {error:.1e} for {rows} rows"
    return None


def refuse(scheme, device, dtype, shape):
    if scheme.activations is None:
        return "multiplies inputs in eight bits only"
    kind = torch.device(device).type
    if kind != ("cpu" if triton.INTERPRETED else "cuda"):
        return f"runs on GPUs, not on {kind}"
    if reason := available():
        return reason
    if scheme.bits not in triton.KERNEL_BITS:
        return f"has kernels of {', '.join(map(str, triton.KERNEL_BITS))} bits, not of {scheme.bits}"
    if not scheme.sym:
        return "multiplies by symmetric weights only"
    if len(shape) != 2:
        return "multiplies by one matrix at a time"
    try:
        layout = _layout(scheme, shape, dtype)
    except ValueError as error:
        return first_line(error)
    return _trial(layout.bits, min(layout.group_size, _TRIAL_SHAPE[1]), dtype, torch.device(device))


def _layout(scheme, shape, dtype=torch.float32):
    """dtype: of x; weights are stored alike for all."""
    from lowbit_kernels.int8.layout import Int8Layout

    return Int8Layout(scheme.bits, triton.kernel_group(scheme, shape), dtype, *shape)


def prepare(qweight: QuantWeight):
    """`sums`, of the rows of the weight, where inputs have a zero point."""
    from lowbit_kernels.int8 import layout as int8_layout

    qweight.require_natural_order("the triton_int8 backend")
    scheme = qweight.scheme
    layout = _layout(scheme, qweight.codes.shape)
    weight, scales = int8_layout.pack(qweight.codes, qweight.scales, layout)
    # not "weight", which a layer makes when it is asked for; scales_like, without elements, tells `restore` the dtype
    buffers = {"packed": weight, "scales": scales, "scales_like": qweight.scales.new_empty(0)}
    if not scheme.activations.sym:
        buffers["sums"] = int8_layout.row_sums(qweight.codes, qweight.scales, layout)
    return buffers | {name: getattr(qweight, name) for name in input_grid(scheme)}


def restore(buffers, scheme, shape):
    from lowbit_kernels.int8 import layout as int8_layout

    codes, scales = int8_layout.unpack(buffers["packed"], buffers["scales"], _layout(scheme, shape))
    grid = {name: buffers[name] for name in input_grid(scheme)}
    return QuantWeight(codes, scales.to(buffers["scales_like"].dtype), scheme, **grid)


def linear(x, buffers, scheme, shape, bias=None):
    return torch.ops.lowbit_kernels.int8_linear(
        x, buffers["packed"], buffers["scales"], buffers.get("sums"), bias, buffers.get("input_scale"),
        buffers.get("input_zero"), scheme.bits, triton.kernel_group(scheme, shape), shape[0],
    )  # fmt: skip


def explain(scheme, shape: tuple[int, int], dtype, rows: int, device) -> dict:
    """As `triton.explain`."""
    from lowbit_kernels.tuning import select

    return triton.described(select.choose(_layout(scheme, shape, dtype), rows, torch.device(device)))


def tune(scheme, shape: tuple[int, int], dtype, rows: int, device) -> dict:
    """As `triton.tune`."""
    return triton.tuned(_layout(scheme, shape, dtype), rows, device)
