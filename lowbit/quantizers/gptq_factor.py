"""Linear algebra of GPTQ: the damped Hessian as a triangular factor, and systems solved with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Damping is raised by this factor, at most so often, until the Hessian can be factored
_DAMPING_STEPS = 6
_DAMPING_FACTOR = 10.0
_LEAST_DAMPING = 1e-6
# Elements of the work arrays of a slice of rows: what stays in a CPU's caches
SLICE_ELEMENTS = 2**21


@dataclass
class Factor:
    """H = R R^T with R upper triangular, as M = R / diag(R) and the squared diagonal of R: H = M diag(costs) M^T.

    feedback: M, float32 [K, K], with ones on its diagonal: [j, k] is by how much the error of column j moves the
    target of column k. costs: float32 [K], the weight of the squared rounding error of each column in the objective.
    """

    feedback: torch.Tensor
    costs: torch.Tensor

    def within(self, block: slice) -> Factor:
        """Restrict it to the columns of a block, for targets that hold the feedback of all columns before."""
        return Factor(self.feedback[block, block], self.costs[block])

    def carried_into(self, block: slice, error: torch.Tensor) -> torch.Tensor:
        """By how much the errors [K, N] of the columns before a block move its best weight without rounding, [g, N]."""
        gathered = self.feedback[: block.start, block].T @ error[: block.start]
        within = self.feedback[block, block].T
        return torch.linalg.solve_triangular(within, gathered, upper=False, unitriangular=True)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Solve H X = right, [K, N] both."""
        half = torch.linalg.solve_triangular(self.feedback, right, upper=True, unitriangular=True)
        half.div_(self.costs.unsqueeze(1))
        return torch.linalg.solve_triangular(self.feedback.T, half, upper=False, unitriangular=True)


def factored_damped(hessian: torch.Tensor, damping: float) -> tuple[Factor | None, float]:
    """Add `damping` times its mean to the diagonal of the Hessian, in place, more if it has no factor otherwise.

    Returns the factor, None if nothing helps, and the damping in the end.
    """
    mean = float(hessian.diagonal().mean())
    added = 0.0
    for _ in range(_DAMPING_STEPS):
        hessian.diagonal().add_((damping - added) * mean)
        factor = factored(hessian)
        if factor is not None:
            return factor, damping
        damping, added = max(damping, _LEAST_DAMPING) * _DAMPING_FACTOR, damping
    return None, damping


def factored(matrix: torch.Tensor) -> Factor | None:
    """Factor a symmetric float32 matrix [K, K], in float64; None if it is not positive definite."""
    # L L^T = the matrix with its rows and columns in reverse order: R is L with its own reversed
    lower = _reversed(matrix, torch.float64).T  # column by column, as LAPACK wants it to work in place
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if failed or not lower.diagonal().isfinite().all():
        return None
    diagonal = lower.diagonal().clone()
    return Factor(_reversed(lower.div_(diagonal), torch.float32), diagonal.square().float().flip(0))


def _reversed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reverse the order of rows and of columns, in another dtype, without a copy of the whole matrix in between."""
    made = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows in slices(len(matrix), len(matrix)):
        made[len(matrix) - rows.stop : len(matrix) - rows.start] = matrix[rows].flip(0, 1)
    return made


def slices(count: int, width: int) -> Iterator[slice]:
    """Cut `count` rows of `width` elements each into slices that fit into the caches of a CPU."""
    length = max(SLICE_ELEMENTS // width, 1)
    return (slice(start, min(start + length, count)) for start in range(0, count, length))
