"""The two loops of GPTQ over the columns of a group, in plain torch: what the GPU kernels are held to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.quantizers.gptq_factor import Factor
from lowbit.quantizers.gptq_grids import Grid

# Moves inside of a block of this many columns are passed on column by column, beyond it by a matrix product
_BLOCK = 8


@dataclass
class Rounded:
    """A group of N rows on the cheapest of its candidates: codes float32 [g, N], grid [N], cost float32 [N]."""

    codes: torch.Tensor
    grid: Grid
    cost: torch.Tensor


@dataclass
class Descended:
    """Codes after a pass of coordinate descent, float32 [g, N]; change, by how much that moved their values, float32
    [g, N]; gain, what it takes off the objective, float32 [N]."""

    codes: torch.Tensor
    change: torch.Tensor
    gain: torch.Tensor


def round_columns(target: torch.Tensor, factor: Factor, grids: Grid, levels: int) -> Rounded:
    """Round the columns of a group one after the other, each corrected for the errors of those before it.

    target: float32 [g, N]. factor: within the group. grids: candidates [C, N]; each row keeps the cheapest.
    """
    length, rows = target.shape
    lowest, highest = -grids.zeros, levels - 1 - grids.zeros
    # a column holds its target, with the feedback so far, until its turn, and its error after that
    columns = target.new_empty(length, len(grids), rows).copy_(target.unsqueeze(1))
    flat, steps = columns.view(length, -1), torch.empty_like(columns)
    rounding, cost = torch.empty_like(grids.scales), torch.zeros_like(grids.scales)
    costs, feedback = factor.costs.tolist(), factor.feedback.T.contiguous()
    for start, middle, stop in _turns(0, length):
        if middle < stop:
            flat[middle:stop].addmm_(feedback[middle:stop, start:middle], flat[start:middle])
            continue
        column, step = columns[start], steps[start]
        torch.div(column, grids.scales, out=step).round_()
        torch.clamp(step, lowest, highest, out=step)
        torch.addcmul(column, step, grids.scales, value=-1, out=rounding)
        cost.addcmul_(rounding, rounding, value=costs[start])
        torch.addcmul(target[start], step, grids.scales, value=-1, out=column)
    best = cost.argmin(0, keepdim=True)
    scales, zeros, least = (candidates.gather(0, best)[0] for candidates in (grids.scales, grids.zeros, cost))
    codes = steps.gather(1, best.expand(length, 1, rows))[:, 0].add_(zeros)
    return Rounded(codes, Grid(scales, zeros), least)


def _turns(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Halve the columns again and again: (k, k + 1, k + 1) is the turn of column k, any other (start, middle, stop)
    that of the product which carries the errors of the first half into the second."""
    middle = start + (stop - start + 1) // 2
    if middle == stop:
        yield start, middle, stop
        return
    yield from _turns(start, middle)
    yield start, middle, stop
    yield from _turns(middle, stop)


def descend(codes: torch.Tensor, grid: Grid, descent: torch.Tensor, hessian: torch.Tensor, levels: int) -> Descended:
    """Move each code to its best value while all others stay, one column after the other.

    codes: float32 [g, N]. grid: [N]. descent: half the negated gradient, float32 [g, N], which is used up.
    hessian: that of these columns, float32 [g, g].
    """
    found, change = torch.empty_like(codes), torch.empty_like(codes)
    gain = torch.zeros_like(grid.scales)
    for start in range(0, len(codes), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(codes)))
        nearby = hessian[block, block].tolist()
        for k in range(block.stop - start):
            force, curvature = descent[start + k], nearby[k][k]
            for j in range(k):
                force = force.sub(change[start + j], alpha=nearby[k][j])
            now = grid.values(codes[start + k])
            found[start + k] = grid.nearest(now + force / curvature, levels)
            moved = torch.sub(grid.values(found[start + k]), now, out=change[start + k])
            gain += moved * (2 * force - curvature * moved)
        descent[block.stop :] -= hessian[block.stop :, block] @ change[block]
    return Descended(found, change, gain)
