"""The kernels of lowbit.native: CPUs with a C compiler."""

from functools import partial

import torch

from lowbit.native import gemm
from lowbit.native.build import library
from lowbit.native.linear import PIECES, pack, unpack
from lowbit.native.operators import ROUNDED_ROWS
from lowbit.numerics.scheme import BITS, Scheme


def available() -> str | None:
    found = library()
    return found if isinstance(found, str) else None


def instructions() -> dict | None:
    """{"used", "available", "rounded_bits"}: the level of instructions that the kernels use, those that this machine
    runs, the best first, and bits of weights whose inputs they round by default. None where there are no kernels."""
    found = library()
    if isinstance(found, str):
        return None
    return {"used": found.level, "available": list(found.levels), "rounded_bits": _rounded_bits()}


def _rounded_bits() -> list[int]:
    return [bits for bits in BITS if rounds(Scheme(bits, 128))]


def refuse(scheme, device, dtype, shape):
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not on {torch.device(device).type}"
    if dtype not in PIECES:
        return f"runs {', '.join(str(known).removeprefix('torch.') for known in PIECES)}, not {dtype}"
    return available()


prepare, restore = pack, unpack


def refuse_rounded(scheme: Scheme) -> str | None:
    return gemm.refuse(scheme, "int8", torch.float32)


def rounds(scheme: Scheme) -> bool:
    return refuse_rounded(scheme) is None and gemm.rounds(scheme, library().level)


def rounded_inputs() -> str:
    return f"int8 inputs from {ROUNDED_ROWS} rows on"


def linear(x, buffers, scheme, shape, bias=None, exact=True):
    optional = (buffers.get(name) for name in ("zeros", "input_scale", "input_zero"))
    return torch.ops.lowbit.linear_native(
        x, buffers["codes"], buffers["scales"], *optional, bias, scheme.name, shape[0], exact
    )


def experts(x, buffers, expert_start, scheme, shape, bias=None, exact=True):
    optional = (buffers.get(name) for name in ("zeros", "input_scale", "input_zero"))
    return torch.ops.lowbit.experts_native(
        x, buffers["codes"], buffers["scales"], *optional, bias, expert_start, scheme.name, shape[1], exact
    )


linear_rounded, experts_rounded = partial(linear, exact=False), partial(experts, exact=False)
