"""Sweeps of GPTQ: group after group, all others fixed, its scale, its grid and its codes move to better values.

With the error e = w - q of a row and the groups of all others fixed, moving the values of a group by d changes the
objective e^T H e by d^T B d - 2 d^T r: B is the group's own block of H, and r = H e, restricted to the group, is half
the negated gradient, called `descent`. A step is taken only where that is negative; its size is the `gain`.
"""

from dataclasses import dataclass

import torch

from lowbit.numerics.scheme import Scheme
from lowbit.quantizers.gptq_factor import Factor, factored, slices
from lowbit.quantizers.gptq_grids import LONGEST_SEARCHED, Grid, Solution, around, storable
from lowbit.quantizers.gptq_kernels import descend, round_columns

# Columns whose descent is brought up to date together
_WIDEST_DESCENT = 128


@dataclass
class Curvature:
    """What all sweeps need of the columns of a group: the factor of B = M diag(costs) M^T, and M^-1, float32 [g, g]."""

    factor: Factor
    inverse: torch.Tensor

    @classmethod
    def of_groups(cls, solution: Solution, hessian: torch.Tensor) -> list["Curvature"] | None:
        """Of each group; None where groups are too long to be rounded anew."""
        if solution.group > LONGEST_SEARCHED:
            return None
        return [cls._of(hessian[block, block]) for _, block in solution.blocks()]

    @classmethod
    def _of(cls, block: torch.Tensor) -> "Curvature":
        factor = factored(block)
        assert factor is not None, "a block of a positive definite matrix is one"
        one = torch.eye(len(block), dtype=torch.float64, device=block.device)
        inverse = torch.linalg.solve_triangular(factor.feedback.double(), one, upper=True, unitriangular=True)
        return cls(factor, inverse.float())


@dataclass
class _Group:
    """One group of some rows of a solution. What is changed in place are views of the solution, and `descent`.

    codes, error: float32 [g, N]. grid: [N]. descent: float32 [g, N]. hessian: B, float32 [g, g].
    """

    codes: torch.Tensor
    grid: Grid
    error: torch.Tensor
    descent: torch.Tensor
    hessian: torch.Tensor


def sweep(
    solution: Solution, hessian: torch.Tensor, curvatures: list[Curvature] | None, scheme: Scheme, dtype: torch.dtype
) -> None:
    """Refine each group once, in place; no step raises the cost of any row.

    hessian: float32 [K, K], damped, in the order of the solution. curvatures: of its groups. dtype: that of stored
    scales.
    """
    for number, block in solution.blocks():
        rows_of_hessian = hessian[block]
        for rows in slices(solution.codes.shape[1], solution.group):
            errors = solution.error[:, rows]
            group = _Group(
                codes=solution.codes[block, rows],
                grid=solution.grid(number).rows(rows),
                error=errors[block],
                descent=rows_of_hessian @ errors,
                hessian=rows_of_hessian[:, block],
            )
            gain = _fit_scales(group, dtype)
            if curvatures is not None:
                gain += _try_grids(group, curvatures[number], scheme, dtype)
            for first in range(0, solution.group, _WIDEST_DESCENT):
                span = slice(first, min(first + _WIDEST_DESCENT, solution.group))
                if first:  # the spans before have moved
                    group.descent[span] = rows_of_hessian[span] @ errors
                gain += _move_codes(group, span, scheme)
            solution.cost[rows] -= gain


def _fit_scales(group: _Group, dtype: torch.dtype) -> torch.Tensor:
    """Fit the scale of each row by least squares, all else fixed. Returns the gain, float64 [N]."""
    steps = group.codes - group.grid.zeros
    curved = group.hessian @ steps
    slope, curvature = (steps * group.descent).sum(0), (steps * curved).sum(0)
    scales = group.grid.scales
    fitted = storable(scales + slope / curvature.clamp_min(1e-30), dtype)
    change = torch.where((fitted * scales > 0) & (curvature > 0), fitted - scales, 0.0)
    gain = change * (2 * slope - change * curvature)
    change = torch.where(gain > 0, change, 0.0)
    scales += change
    group.error -= change * steps
    group.descent -= change * curved
    return gain.clamp_min(0).double()


def _try_grids(group: _Group, curvature: Curvature, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Round the group's best weight anew on grids around its own, and keep what is cheaper. Returns the gain,
    float64 [N]."""
    before = group.grid.values(group.codes)
    # in two products: B^-1 as one matrix would lose what small eigenvalues say of costs
    half = curvature.inverse @ group.descent
    scaled = half / curvature.factor.costs.unsqueeze(1)
    newton = curvature.inverse.T @ scaled  # the step to the best weight of the group without rounding
    present = (half * scaled).sum(0)  # the group's cost, up to what no choice in it changes
    grids = around(group.grid, scheme, dtype)
    gain = torch.zeros_like(present)
    for part in slices(before.shape[1], len(before) * len(grids)):
        tried = round_columns(before[:, part] + newton[:, part], curvature.factor, grids.rows(part), scheme.levels)
        better = tried.cost < present[part]
        gain[part] = torch.where(better, present[part] - tried.cost, 0.0)
        codes, grid = group.codes[:, part], group.grid.rows(part)
        codes.copy_(torch.where(better, tried.codes, codes))
        grid.scales.copy_(torch.where(better, tried.grid.scales, grid.scales))
        grid.zeros.copy_(torch.where(better, tried.grid.zeros, grid.zeros))
    change = group.grid.values(group.codes) - before
    group.error -= change
    group.descent -= group.hessian @ change
    return gain.double()


def _move_codes(group: _Group, span: slice, scheme: Scheme) -> torch.Tensor:
    """Move the codes of some columns by coordinate descent. Returns the gain, float64 [N]."""
    moved = descend(group.codes[span], group.grid, group.descent[span], group.hessian[span, span], scheme.levels)
    group.codes[span] = moved.codes
    group.error[span] -= moved.change
    return moved.gain.double()
