"""The loops over the columns of a group where they run fastest: in kernels that were tried first, or in torch.

`lowbit_kernels.gptq` runs all columns of a group in one launch on a GPU, `lowbit.native.gptq` in one call on a CPU.
"""

import logging
from functools import cache
from types import ModuleType

import torch

from lowbit.errors import first_line
from lowbit.native.build import library
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import gptq_loops
from lowbit.quantizers.gptq_factor import Factor, factored
from lowbit.quantizers.gptq_grids import Grid, spanning
from lowbit.quantizers.gptq_loops import Descended, Rounded

logger = logging.getLogger("lowbit")


def round_columns(target: torch.Tensor, factor: Factor, grids: Grid, levels: int) -> Rounded:
    """See `gptq_loops.round_columns`."""
    kernels = trusted_kernels(target.device)
    if kernels is None or len(target) > kernels.LONGEST:
        return gptq_loops.round_columns(target, factor, grids, levels)
    codes, scales, zeros, cost = kernels.columns(
        target, factor.feedback, factor.costs, grids.scales, grids.zeros, levels
    )
    return Rounded(codes, Grid(scales, zeros), cost)


def descend(codes: torch.Tensor, grid: Grid, descent: torch.Tensor, hessian: torch.Tensor, levels: int) -> Descended:
    """See `gptq_loops.descend`."""
    kernels = trusted_kernels(codes.device)
    if kernels is None:
        return gptq_loops.descend(codes, grid, descent, hessian, levels)
    return Descended(*kernels.descend(codes, grid.scales, grid.zeros, descent, hessian, levels))


@cache
def trusted_kernels(device: torch.device) -> ModuleType | None:
    """The kernels of a device, once they are compared with `gptq_loops`; None where there are none, or where they
    compute something else, which is logged."""
    try:
        kernels, reason = _kernels(device.type)
        reason = reason or (difference(kernels, device) if kernels else None)
    except Exception as error:  # no triton, or a compiler or driver that fails: there is another way
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason:
        logger.warning("GPTQ runs its columns one by one, which takes longer: %s", reason)
    return None if reason else kernels


def _kernels(kind: str) -> tuple[ModuleType | None, str | None]:
    """Those of a kind of device, or why it has none."""
    if kind == "cuda":
        from lowbit_kernels import gptq

        return gptq, None
    if kind != "cpu":
        return None, f"there are none for {kind}"
    from lowbit.native import gptq as native

    built = library()
    return (None, built) if isinstance(built, str) else (native, None)


def difference(kernels: ModuleType, device: torch.device) -> str | None:
    """How a small problem comes out of `kernels` otherwise than of `gptq_loops`, or None."""
    scheme = Scheme(4, 64, False)
    rng = torch.Generator().manual_seed(0)
    target, mixed = torch.randn(64, 96, generator=rng), torch.randn(64, 64, generator=rng)
    hessian = mixed @ mixed.T / 64 + torch.eye(64)
    factor = factored(hessian)
    assert factor is not None
    grids = spanning(target, (1.0, 0.9, 0.8), scheme, torch.float32)
    rounded = gptq_loops.round_columns(target, factor, grids, scheme.levels)
    arguments = [tensor.to(device) for tensor in (target, factor.feedback, factor.costs, grids.scales, grids.zeros)]
    codes, _, _, cost = (tensor.cpu() for tensor in kernels.columns(*arguments, scheme.levels))
    if not torch.allclose(cost, rounded.cost, rtol=1e-2) or not _alike(codes, rounded.codes):
        return f"the codes that it finds column by column differ from the definition's on {device}"

    codes, grid = rounded.codes, rounded.grid
    descent = hessian @ (target - grid.values(codes))
    arguments = [tensor.to(device, copy=True) for tensor in (codes, grid.scales, grid.zeros, descent, hessian)]
    found, _, gain = (tensor.cpu() for tensor in kernels.descend(*arguments, scheme.levels))
    descended = gptq_loops.descend(codes, grid, descent, hessian, scheme.levels)
    same_gain = torch.allclose(gain.double().sum(), descended.gain.double().sum(), rtol=1e-2)
    if not same_gain or not _alike(found, descended.codes):
        return f"the codes that it descends to differ from the definition's on {device}"
    return None


def _alike(codes: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether all but a few are the same: values close to a tie may go either way."""
    return bool((codes == others).float().mean() > 0.99)
