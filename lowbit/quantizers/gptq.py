"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) and what makes it better: error feedback, then refinement.

The quantized weight Q of a linear minimises, over the inputs x of the calibration tokens,

    tr((W - Q) H (W - Q)^T) = mean of ||(W - Q) x||^2,          H = mean of x x^T.

In six steps, which `quantize` takes one after the other:

1. Order: groups with the largest inputs first, and inside of a group the largest inputs first ("group-aware" order). A
   group stays a set of consecutive inputs: nothing has to be stored about the order.
2. Damping: a share of its mean is added to the diagonal of H, which stands for the tokens that calibration did not see.
3. Factor (`gptq_factor`). H = R R^T with R upper triangular, so that the error is ||(W - Q) R||^2, a sum over columns
   in which column k only depends on columns j <= k. R is the inverse of the paper's factor, chol(H^-1)^T, whose rows
   divided by their diagonal feed errors forward; M = R / diag(R) gathers the same feedback, without inverting anything:
       t_k = w_k + sum over j < k of (w_j - q_j) M_jk,        q_k = nearest grid point to t_k,
       error of column k = R_kk^2 (t_k - q_k)^2.
4. Target. What comes before is quantized already: x is the input that this leaves, f that of the original model, and
   the output to reach is W f. The best weight for that without rounding is W + E H^-1 with the residual error
   E = mean of (W f - W x) x^T (GPTAQ, arXiv:2504.02692; Qronos, arXiv:2505.11695). Quantizing it minimises the error
   against the original outputs. For a linear whose output is added to the residual stream, the error of that stream is
   part of E (`calibration/moments.py`, where E is "missing"). What is fitted to few tokens, or to what x does not tell,
   does harm: the share of E H^-1 that is added is the best one for tokens that were left out of H and E (`_share`).
5. Grids (`gptq_grids`). When its turn comes, each group tries some scales and zero points around the range of its
   *current* weights, the best now that earlier groups are fixed; it runs its own columns on each (`gptq_loops`),
   feedback included, and every row keeps the cheapest.
6. Sweeps (`gptq_refine`). Group after group, all others fixed: its scale in closed form (least squares; cf. "two-stage
   grid optimization", arXiv:2602.02126), then 5. again around its grid, for what is now the best weight of the group
   without rounding, then each code to its best value (coordinate descent; QuantEase, arXiv:2309.01885). A row takes
   what is cheaper than what it has: no step can raise its error.

Everything is done for all rows at once, on transposed matrices [K, N]: a column of the paper is a contiguous row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import Between
from lowbit.quantizers.gptq_factor import Factor, factored_damped, slices
from lowbit.quantizers.gptq_grids import LONGEST_SEARCHED, SHRINKS, Solution, spanning
from lowbit.quantizers.gptq_kernels import round_columns
from lowbit.quantizers.gptq_refine import Curvature, sweep

OPTIONS = {
    "order": ("group", "none"),
    "scale_search": ("columns", "minmax"),
    "damping": Between(0.03, 0.0, 10.0),
    "drift": Between("auto", 0.0, 1.0),
    "sweeps": Between("auto", 0, 100),
}


class Judge(Protocol):
    """Tokens that were among those of H and E. x: floating [T, K], inputs. lacking: floating [T, N], what the output
    lacks there, so that `missing` is the mean of lacking x^T over all. tokens: how many all are."""

    x: torch.Tensor
    lacking: torch.Tensor
    tokens: int


# Sweeps by bits. Mean KL on the embedded model with one and with three: 3 bits, group 64, 0.00865 and 0.00831; 4 bits,
# group 128, 0.00235 and 0.00238
_SWEEPS = {2: 3, 3: 3, 4: 1, 5: 1, 6: 1, 8: 1}


def needs(options: Mapping) -> tuple[str, ...]:
    return ("hessian", "missing") if options["drift"] != 0 else ("hessian",)


def quantize(weight: torch.Tensor, stats: dict, scheme: Scheme, options: Mapping) -> tuple[QuantWeight, dict]:
    """Quantize one weight by the six steps of the module.

    Args:
        weight: Floating [N, K].
        stats: "hessian", H, floating [K, K], and "missing", E, floating [N, K] or None, which are taken out, so that
            they are freed if nobody else holds them; and "judge", a `Judge` or None, for `drift="auto"`.
        scheme: The grid; its group size divides K.
        options: All of `OPTIONS`.

    Returns:
        The weight, and notes: "objective", stage -> float64 [N], the error of each row after it, relative to that of a
        row of zeros, which is "energy", float64 [N]; "damping", the share of the mean diagonal that was added; "moved",
        float32 [N], by how much each row was moved before it was rounded, where step 4 or inputs that are always zero
        did; "drift", the share of step 4, where there is E. Where H cannot be factored at any damping (NaN, infinite)
        or E is not finite, the weight is rounded to nearest, and "fallback", the only note, says why.
    """
    # 1. Order
    order = _order(stats["hessian"].diagonal(), scheme.group_of(weight.shape[1]), options["order"])
    hessian = stats.pop("hessian").float()[order.unsqueeze(1), order]
    dead = _fill_dead(hessian)
    if dead.all():
        return _nearest(weight, scheme, "no input was ever other than zero")
    # 2. Damping, and 3. Factor
    factor, damping = factored_damped(hessian, options["damping"])
    if factor is None:
        return _nearest(weight, scheme, "the Hessian cannot be factored")
    # 4. Target
    target, moved = _ordered(weight, order, dead)
    share = None
    if (residual := stats.pop("missing", None)) is not None:
        change = factor.solve(residual.T[order].float())
        share = _share(change, factor, stats.get("judge"), order) if options["drift"] == "auto" else options["drift"]
        target += change.mul_(share)
        moved = moved.hypot(torch.linalg.vector_norm(change, dim=0))
        if not moved.isfinite().all():
            return _nearest(weight, scheme, "the drift is not finite")
        del residual, change  # as large as the weight
    # 5. Grids
    solution = _error_feedback(target, factor, scheme, weight.dtype, options["scale_search"] == "columns")
    del factor  # as large as the Hessian
    objective = {"gptq": solution.cost.clone()}
    # 6. Sweeps
    curvatures = Curvature.of_groups(solution, hessian)
    for number in range(1, _sweeps(options, scheme) + 1):
        sweep(solution, hessian, curvatures, scheme, weight.dtype)
        objective[f"sweep {number}"] = solution.cost.clone()

    energy = ((hessian @ target) * target).sum(0, dtype=torch.float64).clamp_min(1e-30)
    objective = {stage: cost / energy for stage, cost in objective.items()}
    notes = {"objective": objective, "energy": energy, "damping": damping}
    notes |= ({"moved": moved} if moved.any() else {}) | ({} if share is None else {"drift": share})
    return solution.as_weight(order, scheme, weight.dtype), notes


def _nearest(weight: torch.Tensor, scheme: Scheme, reason: str) -> tuple[QuantWeight, dict]:
    return quantize_nearest(weight, scheme, "mse"), {"fallback": f"rtn: {reason}"}


def _sweeps(options: Mapping, scheme: Scheme) -> int:
    return _SWEEPS[scheme.bits] if options["sweeps"] == "auto" else options["sweeps"]


def _order(diagonal: torch.Tensor, group: int, how: str) -> torch.Tensor:
    """Sort the columns into the order in which they are quantized, int64 [K]; groups stay together."""
    if how == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    groups = diagonal.view(-1, group)
    first = torch.argsort(groups.amax(1), descending=True, stable=True)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    return (first[:, None] * group + inside[first]).flatten()


def _fill_dead(hessian: torch.Tensor) -> torch.Tensor:
    """Give inputs that are always zero a diagonal, in place. Returns which they are, bool [K]."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = diagonal.clamp_min(0).mean().clamp_min(1e-30)
    return dead


def _ordered(weight: torch.Tensor, order: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transpose the weight in `order`, float32 [K, N], with zeros where inputs are dead: there any code does, and that
    of zero is best. Returns it, and by how much that moved each row, float32 [N]."""
    target = weight.T[order].float()
    moved = torch.linalg.vector_norm(target[dead], dim=0)
    target[dead] = 0
    return target, moved


def _share(change: torch.Tensor, factor: Factor, judge: Judge | None, order: torch.Tensor) -> float:
    """How much of a change to the target is best for tokens that it is not made from, from 0 to 1; all of it without a
    judge.

    Those of the judge were among the tokens that H and E are means of. What the change would predict for them without
    them follows from what it does predict, since it solves a least squares problem: with S = X H^-1 X^T / tokens, what
    is left over of Y = lacking is (I - S)^-1 (Y - X change) (leave-one-out of ridge regression, for several at once).

    change: float32 [K, N], ordered as the factor is.
    """
    if judge is None:
        return 1.0
    x, lacking = judge.x.float()[:, order], judge.lacking.float()
    influence = x @ factor.solve(x.T) / judge.tokens
    others = torch.eye(len(x), device=x.device) - influence
    left = torch.linalg.solve(others.double(), (lacking - x @ change).double())
    predicted = lacking - left
    share = (predicted * lacking).sum() / predicted.square().sum().clamp_min(1e-30)
    return float(share.clamp(0, 1)) if share.isfinite() else 0.0


def _error_feedback(target: torch.Tensor, factor: Factor, scheme: Scheme, dtype: torch.dtype, search: bool) -> Solution:
    """Quantize group after group, each column corrected for the errors of those before it.

    target: float32 [K, N]. dtype: that of stored scales. search: whether groups try more than the grid of their range.
    """
    group = scheme.group_of(len(target))
    shrinks = SHRINKS if search and group <= LONGEST_SEARCHED else (1.0,)
    solution = Solution.empty(target, group)
    for number, block in solution.blocks():
        wanted = target[block]
        if number:  # the best weight of the group, itself not rounded, now that the groups before it are
            wanted = wanted + factor.carried_into(block, solution.error)
        codes, grid = solution.codes[block], solution.grid(number)
        for rows in slices(target.shape[1], group * len(shrinks)):
            candidates = spanning(wanted[:, rows], shrinks, scheme, dtype)
            rounded = round_columns(wanted[:, rows], factor.within(block), candidates, scheme.levels)
            codes[:, rows] = rounded.codes
            grid.scales[rows] = rounded.grid.scales
            grid.zeros[rows] = rounded.grid.zeros
            solution.cost[rows] += rounded.cost
        solution.error[block] = target[block] - grid.values(codes)
    return solution
