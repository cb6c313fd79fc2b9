"""The kernels of lowbit.native: CPUs with a C compiler."""

import torch

from lowbit.native.build import library
from lowbit.native.linear import PIECES, pack, unpack


def available() -> str | None:
    found = library()
    return found if isinstance(found, str) else None


def instructions() -> dict | None:
    """{"used", "available"}: the level of instructions that the kernels use, and those that this machine runs, the best
    first. None where there are no kernels."""
    found = library()
    return None if isinstance(found, str) else {"used": found.level, "available": list(found.levels)}


def refuse(scheme, device, dtype, shape):
    if torch.device(device).type != "cpu":
        return f"runs on cpu, not on {torch.device(device).type}"
    if dtype not in PIECES:
        return f"runs {', '.join(str(known).removeprefix('torch.') for known in PIECES)}, not {dtype}"
    return available()


prepare, restore = pack, unpack


def linear(x, buffers, scheme, shape, bias=None):
    optional = (buffers.get(name) for name in ("zeros", "input_scale", "input_zero"))
    return torch.ops.lowbit.linear_native(
        x, buffers["codes"], buffers["scales"], *optional, bias, scheme.name, shape[0]
    )


def experts(x, buffers, expert_start, scheme, shape, bias=None):
    optional = (buffers.get(name) for name in ("zeros", "input_scale", "input_zero"))
    return torch.ops.lowbit.experts_native(
        x, buffers["codes"], buffers["scales"], *optional, bias, expert_start, scheme.name, shape[1]
    )
