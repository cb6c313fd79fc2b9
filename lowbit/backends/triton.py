"""The kernels of `lowbit_kernels`: dequantization fused into the product, on GPUs."""

import logging
from collections.abc import Callable
from functools import cache

import torch

from lowbit.errors import first_line
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import PER_CHANNEL

logger = logging.getLogger("lowbit")

# Tests set it: kernels then run on the CPU, in triton's interpreter (TRITON_INTERPRET=1)
INTERPRETED = False

# Codes of as many bits have a layout in `lowbit_kernels`
KERNEL_BITS = (2, 3, 4, 8)
_DTYPES = (torch.bfloat16, torch.float16)
_GROUP_MULTIPLE = 32
# The trial of a GPU: rows for each of the two kernels, a weight, and far more error than rounding makes
_TRIAL_ROWS, _TRIAL_SHAPE, _TRIAL_ERROR = (1, 33), (64, 512), 2e-2


def available() -> str | None:
    if not (torch.cuda.is_available() or INTERPRETED):
        return "there is no GPU"
    try:
        from lowbit_kernels import ops  # noqa: F401 - registers the operators
    except ImportError as error:
        return f"cannot import the kernels: {error}"
    return None


@cache
def _trial(bits: int, sym: bool, dtype: torch.dtype, device: torch.device, experts: bool) -> str | None:
    """Why the kernels are not to be trusted on `device`, or None: a small product of each is compared with plain torch.
    A compiler or a GPU that nobody has tried them on costs speed then, not correctness. Where the kernel of Hopper
    alone fails, no rule chooses it any more.

    experts: try those for a stack of matrices (here of one) instead of those for one.
    """
    from lowbit_kernels import ops
    from lowbit_kernels.layout import Layout, pack
    from lowbit_kernels.tuning import select
    from lowbit_kernels.tuning.tune import random_weight

    layout = Layout(bits, 128, sym, dtype, *_TRIAL_SHAPE)
    weight = random_weight(layout, device)
    packed = pack(*weight, bits)
    form = (bits, layout.group_size, sym, dtype, layout.out_features)

    def product(x: torch.Tensor) -> torch.Tensor:
        if not experts:
            return ops.linear(x, *packed, None, *form)
        start = torch.tensor([0, len(x)], dtype=torch.int32, device=device)
        return ops.experts(x, *(tensor[None] for tensor in packed), start, None, *form)

    for rows in _TRIAL_ROWS:
        reason = _failure(product, layout, weight, rows)
        if reason and not experts and select.choose(layout, rows, device).kernel == "hopper":
            logger.warning("the kernel of Hopper is not used, the general one is: %s", reason)
            select.distrust("hopper", select.gpu_of(device))
            reason = _failure(product, layout, weight, rows)
        if reason:
            return reason
    return None


def _failure(product: Callable[[torch.Tensor], torch.Tensor], layout, weight, rows: int) -> str | None:
    """What is wrong with a product with random x [rows, in_features], or None."""
    from lowbit_kernels import reference

    device = weight[0].device
    x = torch.randn(rows, layout.in_features, device=device).to(layout.dtype)
    wanted = reference.linear(x.float(), *weight, layout.bits)
    try:
        y = product(x)
    except Exception as error:  # of a compiler or a driver: whatever it is, there is another backend
        return f"its kernels fail on {device}: {type(error).__name__}: {first_line(error)}"
    error = float((y.float() - wanted).norm() / wanted.norm())
    if not error < _TRIAL_ERROR:
        return f"its kernels compute something else on {device}: relative error {error:.1e} for {rows} rows"
    return None


def refuse(scheme, device, dtype, shape):
    if scheme.activations is not None:
        return "multiplies inputs in floating point only"
    kind = torch.device(device).type
    if kind != ("cpu" if INTERPRETED else "cuda"):
        return f"runs on GPUs, not on {kind}"
    if reason := available():
        return reason
    if scheme.bits not in KERNEL_BITS:
        return f"has kernels of {', '.join(map(str, KERNEL_BITS))} bits, not of {scheme.bits}"
    if dtype not in _DTYPES:
        return f"runs bfloat16 and float16, not {dtype}"
    group = scheme.group_size
    if group != PER_CHANNEL and scheme.groups(shape[-1]) > 1 and group % _GROUP_MULTIPLE:
        return f"group_size {group} is not a multiple of {_GROUP_MULTIPLE}"
    return _trial(scheme.bits, scheme.sym, dtype, torch.device(device), experts=len(shape) == 3)


def prepare(qweight: QuantWeight):
    from lowbit_kernels.layout import pack

    qweight.require_natural_order("the triton backend")
    weight, meta = pack(qweight.codes, qweight.scales, qweight.zeros, qweight.scheme.bits)
    # without elements: for `restore` to know the dtype of the scales
    return {"weight": weight, "meta": meta, "scales_like": qweight.scales.new_empty(0)}


def restore(buffers, scheme, shape):
    from lowbit_kernels.layout import Layout, unpack

    layout = Layout(scheme.bits, kernel_group(scheme, shape), scheme.sym, buffers["scales_like"].dtype, *shape)
    codes, scales, zeros = unpack(buffers["weight"], buffers["meta"], layout)
    return QuantWeight(codes, scales, scheme, zeros)


def kernel_group(scheme, shape) -> int:
    """A group that is the whole row is a scale per row, whatever it is called."""
    return scheme.group_size if scheme.groups(shape[-1]) > 1 else PER_CHANNEL


def linear(x, buffers, scheme, shape, bias=None):
    return torch.ops.lowbit_kernels.linear(
        x, buffers["weight"], buffers["meta"], bias,
        scheme.bits, kernel_group(scheme, shape), scheme.sym, buffers["scales_like"].dtype, shape[0],
    )  # fmt: skip


def experts(x, buffers, expert_start, scheme, shape, bias=None):
    return torch.ops.lowbit_kernels.experts(
        x, buffers["weight"], buffers["meta"], expert_start, bias,
        scheme.bits, kernel_group(scheme, shape), scheme.sym, buffers["scales_like"].dtype, shape[-2],
    )  # fmt: skip


def table_of(device) -> str:
    """The file that `tune` writes to."""
    from lowbit_kernels.tuning import select

    return str(select.user_table(select.gpu_of(torch.device(device))))


def tables(device) -> dict[str, dict]:
    """The tables of kernels for a GPU: "shipped table" and "tuned here", which wins -> {"path", "entries": count}."""
    from lowbit_kernels.tuning import select

    files = select.tables(select.gpu_of(torch.device(device)))
    return {origin: {"path": str(path), "entries": len(select.read_table(path))} for origin, path in files.items()}


def compiler_limit(device) -> str | None:
    """What kernels on a GPU go without because this triton would compile it wrong, or None."""
    from lowbit_kernels import launching
    from lowbit_kernels.tuning import select

    return launching.compiler_limit(select.gpu_of(torch.device(device)).capability)


def _layout(scheme, shape, dtype):
    from lowbit_kernels.layout import Layout

    return Layout(scheme.bits, kernel_group(scheme, shape), scheme.sym, dtype, *shape[-2:])


def explain(scheme, shape: tuple[int, ...], dtype, rows: int, device) -> dict:
    """{"kernel", "config", "reason"}: what multiplies x [rows, in_features] by a weight (out_features, in_features),
    or, sorted by expert, by (experts, out_features, in_features), and why."""
    from lowbit_kernels.tuning import select

    layout, device = _layout(scheme, shape, dtype), torch.device(device)
    if len(shape) == 3:
        return described(select.choose_for_experts(layout, rows, shape[0], device))
    return described(select.choose(layout, rows, device))


def described(choice) -> dict:
    return {"kernel": choice.kernel, "config": vars(choice.config), "reason": choice.reason}


def tune(scheme, shape: tuple[int, int], dtype, rows: int, device) -> dict:
    """Find the fastest kernel for x [rows, in_features] and a weight (out_features, in_features), and remember it.

    {"kernel", "config", "us", "key", "dropped"}: dropped says which candidates failed, and why.
    """
    return tuned(_layout(scheme, shape, dtype), rows, device)


def tuned(layout, rows: int, device) -> dict:
    """`tune` for a layout of either kind."""
    from lowbit_kernels.tuning import select
    from lowbit_kernels.tuning.tune import fastest

    device = torch.device(device)
    kernel, config, us, dropped = fastest(layout, rows, device)
    gpu, key = select.gpu_of(device), select.key(layout, rows)
    select.write_table(select.user_table(gpu), gpu, {key: (kernel, config, us)})
    return {"key": key, "kernel": kernel, "config": vars(config), "us": us, "dropped": dropped}
