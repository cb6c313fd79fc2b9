"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) and what makes it better: error feedback, then refinement.

The quantized weight Q of a linear minimises, over the inputs x of the calibration tokens,

    tr((W - Q) H (W - Q)^T) = mean of ||(W - Q) x||^2,          H = mean of x x^T.

In order:

1. Target. Inputs have drifted from f to x, since what comes before is quantized; the output to reach is W f. The best
   weight for that without rounding is W + E H^-1 with E = mean of (W f - W x) x^T (GPTAQ, arXiv:2504.02692; Qronos,
   arXiv:2505.11695). Quantizing it minimises the error against the original outputs. For a linear whose output is added
   to the residual stream, which has drifted too, what the stream lacks is part of E (`calibration/moments.py`).
2. Damping: a share of its mean is added to the diagonal of H, which stands for the tokens that calibration did not see.
3. Order: groups with the largest inputs first, and inside of a group the largest inputs first ("group-aware" order). A
   group stays a set of consecutive inputs: nothing has to be stored about the order.
4. Factor. H = R R^T with R upper triangular, so that the error is ||(W - Q) R||^2, a sum over columns in which column
   k only depends on columns j <= k. R is the inverse of the paper's factor, chol(H^-1)^T, whose rows divided by their
   diagonal feed errors forward; M = R / diag(R) gathers the same feedback, without inverting anything:
       t_k = w_k + sum over j < k of (w_j - q_j) M_jk,        q_k = nearest grid point to t_k,
       error of column k = R_kk^2 (t_k - q_k)^2.
5. Grids. When its turn comes, each group tries some scales and zero points around the range of its *current* weights,
   the best now that earlier groups are fixed; it runs its own columns on each, feedback included, and every row keeps
   the cheapest.
6. Sweeps. Group after group, all others fixed: its scale in closed form (least squares; cf. "two-stage grid
   optimization", arXiv:2602.02126), then 5. again around its grid, for what is now the best weight of the group
   without rounding, then each code to its best value (coordinate descent; QuantEase, arXiv:2309.01885). A row takes
   what is cheaper than what it has: no step can raise its error.

Everything is done for all rows at once, on transposed matrices [K, N]: a column of the paper is a contiguous row here.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import Between

logger = logging.getLogger("lowbit")

OPTIONS = {
    "order": ("group", "none"),
    "scale_search": ("columns", "minmax"),
    "damping": Between(0.03, 0.0, 10.0),
    "drift": Between(1.0, 0.0, 1.0),
    "sweeps": Between("auto", 0, 100),
}

# Sweeps by bits. Mean KL on the embedded model with one and with three: 3 bits, group 64, 0.00865 and 0.00831; 4 bits,
# group 128, 0.00235 and 0.00238
_SWEEPS = {2: 3, 3: 3, 4: 1, 8: 1}
# Damping is raised by this factor, at most so often, until H can be factored
_DAMPING_STEPS, _DAMPING_FACTOR, _LEAST_DAMPING = 6, 10.0, 1e-6
# Feedback inside of a block of this many columns is gathered column by column, beyond it by matrix products
_BLOCK = 8
# Elements of the work arrays of a slice of rows: what stays in a CPU's caches
_SLICE_ELEMENTS = 2**21
# Ranges tried for each group in its turn, relative to that of its targets, and in a sweep, to what it has
_SHRINKS = (1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_RETRIED = (0.9, 0.95, 1.0, 1.05, 1.1)
_LONGEST_SEARCHED_GROUP = 512
# Columns whose gradient is brought up to date together
_WIDEST_DESCENT = 128


def needs(options):
    return ("hessian", "missing") if options["drift"] else ("hessian",)


def quantize(weight, stats, scheme, options):
    """weight: floating [N, K]. stats: "hessian" floating [K, K], "missing" floating [N, K] or None;
    the first is taken out, so that it is freed if nobody else holds it.

    -> (QuantWeight, notes). notes: "objective", stage -> float64 [N], the error of each row after it, relative to that
    of a row of zeros, which is "energy", float64 [N]; "damping", the share of the mean diagonal that was added;
    "moved", float32 [N], by how much each row was moved before it was rounded, where step 1 or inputs that are always
    zero did. Where H cannot be factored at any damping (NaN, infinite): round to nearest, and notes["fallback"] says
    so.
    """
    group = scheme.group_of(weight.shape[1])
    order = _order(stats["hessian"].diagonal(), group, options["order"])
    hessian = stats.pop("hessian").float()[order.unsqueeze(1), order]
    diagonal = hessian.diagonal()
    dead = diagonal <= 0  # inputs that are always zero: any code does, and that of weight zero is best
    diagonal[dead] = diagonal.clamp_min(0).mean().clamp_min(1e-30)
    factor, damping = _factored(hessian, options["damping"])
    if factor is None or dead.all():
        reason = "no input was ever other than zero" if dead.all() else "the Hessian cannot be factored"
        return quantize_nearest(weight, scheme, "mse"), {"fallback": f"rtn: {reason}"}
    target = weight.T[order].float()
    moved = torch.linalg.vector_norm(target[dead], dim=0)
    target[dead] = 0
    feedback, costs = _feedback(factor)
    del factor  # twice the Hessian
    if stats.get("missing") is not None:
        change = _solve(feedback, costs, stats["missing"].T[order].float()).mul_(options["drift"])
        moved = moved.hypot(torch.linalg.vector_norm(change, dim=0))
        target += change
        del change  # as large as the weight
        if not target.isfinite().all():
            return quantize_nearest(weight, scheme, "mse"), {"fallback": "rtn: the drift is not finite"}
    problem = _Problem(target, hessian, group, scheme, weight.dtype)
    solution = problem.error_feedback(feedback, costs, options["scale_search"] == "columns")
    del feedback  # as large as the Hessian
    objective = {"gptq": solution.cost.clone()}
    for sweep in range(1, _sweeps(options, scheme) + 1):
        problem.refine(solution)
        objective[f"sweep {sweep}"] = solution.cost.clone()
    energy = problem.energy()
    objective = {stage: cost / energy for stage, cost in objective.items()}
    notes = {"objective": objective, "energy": energy, "damping": damping} | ({"moved": moved} if moved.any() else {})
    return solution.in_order(order, group, scheme, weight.dtype), notes


def _sweeps(options, scheme: Scheme) -> int:
    return _SWEEPS[scheme.bits] if options["sweeps"] == "auto" else options["sweeps"]


def _factored(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float]:
    """The factor of the Hessian with `damping` times its mean diagonal on its diagonal, which is added in place; with
    more damping if there is none otherwise. (None, ...) if nothing helps."""
    mean, added = float(hessian.diagonal().mean()), 0.0
    for _ in range(_DAMPING_STEPS):
        hessian.diagonal().add_((damping - added) * mean)
        factor = _factor(hessian)
        if factor is not None:
            return factor, damping
        damping, added = max(damping, _LEAST_DAMPING) * _DAMPING_FACTOR, damping
    return None, damping


def _factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """float64 L, lower triangular, with L L^T = the matrix with its rows and columns in reverse order: R is L with its
    own reversed. None if the matrix is not positive definite."""
    factor = _reversed(matrix, torch.float64).T  # column by column, as LAPACK wants it to work in place
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if failed or not factor.diagonal().isfinite().all() else factor


def _reversed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix with its rows and columns in reverse order, in `dtype`; without a copy of all of it in between."""
    made = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows in _slices(len(matrix), _SLICE_ELEMENTS // len(matrix)):
        made[len(matrix) - rows.stop : len(matrix) - rows.start] = matrix[rows].flip(0, 1)
    return made


def _feedback(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M [K, K] and the squared diagonal of R [K], float32. The factor is used up."""
    diagonal = factor.diagonal().clone()
    return _reversed(factor.div_(diagonal), torch.float32), diagonal.square().float().flip(0)


def _solve(feedback: torch.Tensor, costs: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X [K, N] of H @ X = right, H = M diag(costs) M^T."""
    half = torch.linalg.solve_triangular(feedback, right, upper=True, unitriangular=True)
    return torch.linalg.solve_triangular(feedback.T, half.div_(costs.unsqueeze(1)), upper=False, unitriangular=True)


def _order(diagonal: torch.Tensor, group: int, how: str) -> torch.Tensor:
    """int64 [K]: the columns in the order in which they are quantized; groups stay together."""
    if how == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    groups = diagonal.view(-1, group)
    first = torch.argsort(groups.amax(1), descending=True, stable=True)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    return (first[:, None] * group + inside[first]).flatten()


@dataclass
class _Solution:
    """In the order of quantization: codes and error (W - Q) float32 [K, N], scales and zeros float32 [G, N]; cost, what
    is minimised, float64 [N]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    error: torch.Tensor
    cost: torch.Tensor

    def in_order(self, order: torch.Tensor, group: int, scheme: Scheme, dtype: torch.dtype) -> QuantWeight:
        columns = torch.argsort(order)
        groups = torch.argsort(order.view(-1, group)[:, 0])
        codes = self.codes[columns].T.to(torch.int16).to(torch.uint8).contiguous()
        zeros = None if scheme.sym else self.zeros[groups].T.to(torch.uint8).contiguous()
        return QuantWeight(codes, self.scales[groups].T.to(dtype).contiguous(), scheme, zeros)


class _Problem:
    """Minimise, for each column n of W [K, N], (w - q)^T H (w - q) over codes, scales and zeros of groups.

    weight: float32 [K, N]. hessian: float32 [K, K]. dtype: what scales are stored in.
    """

    def __init__(self, weight, hessian, group: int, scheme: Scheme, dtype: torch.dtype):
        self.weight, self.hessian = weight, hessian
        self.group, self.scheme, self.dtype = group, scheme, dtype
        self.top = scheme.levels - 1
        self.searched = group <= _LONGEST_SEARCHED_GROUP

    def energy(self) -> torch.Tensor:
        """float64 [N]: the cost of rounding everything to zero."""
        return ((self.hessian @ self.weight) * self.weight).sum(0, dtype=torch.float64).clamp_min(1e-30)

    def blocks(self):
        """(number, slice of columns) of each group."""
        return ((n, slice(n * self.group, (n + 1) * self.group)) for n in range(len(self.weight) // self.group))

    def error_feedback(self, feedback: torch.Tensor, costs: torch.Tensor, search: bool) -> _Solution:
        """One pass over the columns, each corrected for the errors of those before it. feedback, costs: M [K, K] and
        the squared diagonal of R [K] of the Hessian."""
        weight, (inputs, rows) = self.weight, self.weight.shape
        scales, zeros = (weight.new_empty(inputs // self.group, rows) for _ in range(2))
        cost = weight.new_zeros(rows, dtype=torch.float64)
        found = _Solution(torch.empty_like(weight), scales, zeros, torch.empty_like(weight), cost)
        for number, block in self.blocks():
            target = weight[block]
            if number:  # the best weight of the group, itself not rounded, now that the groups before it are
                gathered = feedback[: block.start, block].T @ found.error[: block.start]
                within = feedback[block, block].T
                target = target + torch.linalg.solve_triangular(within, gathered, upper=False, unitriangular=True)
            shrinks = _SHRINKS if search and self.searched else (1.0,)
            for part in _slices(rows, _SLICE_ELEMENTS // (self.group * len(shrinks))):
                grids = self._ranges(target[:, part], shrinks)
                best = self._columns(target[:, part], feedback[block, block], costs[block], *grids)
                found.codes[block, part], scales[number, part], zeros[number, part], added = best
                cost[part] += added
            found.error[block] = weight[block] - _value(found.codes[block], scales[number], zeros[number])
        return found

    def _ranges(self, target: torch.Tensor, shrinks: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [C, N] that span shrunk ranges of targets [g, N]."""
        shrunk = target.new_tensor(shrinks).unsqueeze(1)
        if self.scheme.sym:
            # all 2^bits codes: the largest |w| lies on the lowest code, whichever sign that takes
            largest = target.gather(0, target.abs().argmax(0, keepdim=True))
            scales = self._stored(-largest * shrunk / self.scheme.middle)
            return scales, torch.full_like(scales, self.scheme.middle)
        low, high = target.amin(0).clamp(max=0) * shrunk, target.amax(0).clamp(min=0) * shrunk
        scales = self._stored((high - low) / self.top)
        zeros = (-low / scales).round_().clamp_(0, self.top)
        return self._with_shifts(scales, zeros) if len(shrinks) > 1 else (scales, zeros)

    def _with_shifts(self, scales, zeros):
        """The same grids, and where there are few codes and free zeros also with those moved by one."""
        if self.scheme.sym or self.scheme.bits > 3:
            return scales, zeros
        return scales.repeat(3, 1), torch.cat([zeros, zeros + 1, zeros - 1]).clamp_(0, self.top)

    def _stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as a file will hold them, never zero and never infinite."""
        limits = torch.finfo(self.dtype)
        least = limits.tiny * limits.eps if self.dtype == torch.float16 else limits.tiny
        sign = torch.where(scales < 0, -1.0, 1.0)
        return (sign * scales.abs().clamp(least, limits.max)).to(self.dtype).float()

    def _nearest(self, target, scales, zeros) -> torch.Tensor:
        return (target / scales).round_().add_(zeros).clamp_(0, self.top)

    def _columns(self, target, feedback, costs, scales, zeros):
        """Run the columns of one group, targets [g, N], on C grids [C, N]. Of the cheapest grid of each row: codes
        [g, N], scales, zeros and cost [N]."""
        kernels = _kernels(target.device)
        if kernels is not None and len(target) <= kernels.LONGEST:
            return kernels.columns(target, feedback, costs, scales, zeros, self.scheme.levels)
        (length, rows), tried = target.shape, len(scales)
        lowest, highest = -zeros, self.top - zeros
        # a column holds its target, with the feedback so far, until its turn, and its error after that
        columns = target.new_empty(length, tried, rows).copy_(target.unsqueeze(1))
        flat, steps = columns.view(length, -1), torch.empty_like(columns)
        off, cost = torch.empty_like(scales), torch.zeros_like(scales)
        weights, feedback = costs.tolist(), feedback.T.contiguous()

        def run(start: int, stop: int) -> None:
            if stop - start > 1:
                middle = start + (stop - start + 1) // 2
                run(start, middle)  # then its errors reach the second half, in one product
                flat[middle:stop].addmm_(feedback[middle:stop, start:middle], flat[start:middle])
                run(middle, stop)
                return
            column, step = columns[start], steps[start]
            torch.div(column, scales, out=step).round_()
            torch.clamp(step, lowest, highest, out=step)
            torch.addcmul(column, step, scales, value=-1, out=off)
            cost.addcmul_(off, off, value=weights[start])
            torch.addcmul(target[start], step, scales, value=-1, out=column)

        run(0, length)
        best = cost.argmin(0, keepdim=True)
        scales, zeros, cost = (grid.gather(0, best)[0] for grid in (scales, zeros, cost))
        return steps.gather(1, best.expand(length, 1, rows))[:, 0].add_(zeros), scales, zeros, cost

    def refine(self, found: _Solution) -> None:
        """One sweep over the groups, in place: its scale in closed form, its grid and codes anew where that is cheaper,
        then code by code. Nothing that is done raises the cost of any row."""
        for number, block in self.blocks():
            for part in _slices(self.weight.shape[1], _SLICE_ELEMENTS // self.group):
                self._refine_group(found, number, block, part)

    def _refine_group(self, found: _Solution, number: int, block: slice, part: slice) -> None:
        inner = self.hessian[block, block]
        codes, error = found.codes[block, part], found.error[block, part]
        scales, zeros = found.scales[number, part], found.zeros[number, part]
        pull = self.hessian[block] @ found.error[:, part]  # half the gradient with respect to the group, negated
        gain = self._fit_scales(codes, scales, zeros, error, pull, inner)
        if self.searched:
            gain += self._try_grids(codes, scales, zeros, error, pull, inner)
        for first in range(0, self.group, _WIDEST_DESCENT):
            span = slice(first, min(first + _WIDEST_DESCENT, self.group))
            if first:
                pull[span] = self.hessian[block.start + span.start : block.start + span.stop] @ found.error[:, part]
            gain += self._descend(codes[span], scales, zeros, error[span], pull[span], inner[span, span])
        found.cost[part] -= gain

    def _fit_scales(self, codes, scales, zeros, error, pull, inner) -> torch.Tensor:
        """Least squares for the scale of the group, all else fixed."""
        steps = codes - zeros
        pulled = inner @ steps
        slope, curvature = (steps * pull).sum(0), (steps * pulled).sum(0)
        fitted = self._stored(scales + slope / curvature.clamp_min(1e-30))
        change = torch.where((fitted * scales > 0) & (curvature > 0), fitted - scales, 0.0)
        gain = change * (2 * slope - change * curvature)
        change = torch.where(gain > 0, change, 0.0)
        scales += change
        error -= change * steps
        pull -= change * pulled
        return gain.clamp_min(0).double()

    def _try_grids(self, codes, scales, zeros, error, pull, inner) -> torch.Tensor:
        """Other grids for the group, all other groups fixed: its best weight without rounding is now the target, and
        its columns are run again on grids around the present one."""
        factor = _factor(inner)
        assert factor is not None, "a block of a positive definite matrix is one"
        feedback, costs = _feedback(factor)
        value = _value(codes, scales, zeros)
        off = _solve(feedback, costs, pull)
        present = (off * pull).sum(0)  # its cost, up to what no choice in this group changes
        grids = self._with_shifts(self._stored(scales * scales.new_tensor(_RETRIED).unsqueeze(1)),
                                  zeros.expand(len(_RETRIED), -1))  # fmt: skip
        gain = torch.zeros_like(present)
        for part in _slices(codes.shape[1], _SLICE_ELEMENTS // (self.group * len(grids[0]))):
            tried = self._columns((value + off)[:, part], feedback, costs, *(grid[:, part] for grid in grids))
            better = tried[3] < present[part]
            gain[part] = torch.where(better, present[part] - tried[3], 0.0)
            for kept, new in zip((codes[:, part], scales[part], zeros[part]), tried[:3], strict=True):
                kept.copy_(torch.where(better, new, kept))
        change = _value(codes, scales, zeros) - value
        error -= change
        pull -= inner @ change
        return gain.double()

    def _descend(self, codes, scales, zeros, error, pull, inner) -> torch.Tensor:
        """One pass of coordinate descent: each code to the best value while all others stay. `pull` is used up."""
        kernels = _kernels(codes.device)
        if kernels is not None:
            found, moved, gain = kernels.descend(codes, scales, zeros, pull, inner, self.scheme.levels)
            codes.copy_(found)
            error -= moved
            return gain.double()
        gain = torch.zeros_like(scales)
        for start in range(0, len(codes), _BLOCK):
            span = slice(start, min(start + _BLOCK, len(codes)))
            nearby, moved = inner[span, span].tolist(), torch.empty_like(pull[span])
            for k in range(span.stop - start):
                force = pull[start + k]
                for j in range(k):
                    force = force.sub(moved[j], alpha=nearby[k][j])
                now = _value(codes[start + k], scales, zeros)
                codes[start + k] = self._nearest(now + force / nearby[k][k], scales, zeros)
                torch.sub(_value(codes[start + k], scales, zeros), now, out=moved[k])
                gain += moved[k] * (2 * force - nearby[k][k] * moved[k])
            error[span] -= moved
            pull[span.stop :] -= inner[span.stop :, span] @ moved
        return gain.double()


@cache
def _kernels(device: torch.device):
    """`lowbit_kernels.gptq`, which runs the columns of a group in one launch, where there is a GPU and triton. None
    elsewhere, and where it gives something else than what is written down here: it is tried once."""
    if device.type != "cuda":
        return None
    try:
        from lowbit_kernels import gptq as kernels

        reason = _differs(kernels, device)
    except Exception as error:  # no triton, or a compiler or driver that fails: there is another way
        reason = f"{type(error).__name__}: {error}"
    if reason:
        logger.warning("GPTQ runs its columns one by one, which takes longer: %s", reason)
    return None if reason else kernels


def _differs(kernels, device: torch.device) -> str | None:
    """How a small problem comes out of the kernels otherwise than here, or None."""
    rng = torch.Generator().manual_seed(0)
    target, mixed = torch.randn(64, 96, generator=rng), torch.randn(64, 64, generator=rng)
    factor = _factor(mixed @ mixed.T / 64 + torch.eye(64))
    assert factor is not None
    feedback, costs = _feedback(factor)
    problem = _Problem(target, mixed, 64, Scheme(4, 64, False), torch.float32)
    grids = problem._ranges(target, (1.0, 0.9, 0.8))
    wanted = problem._columns(target, feedback, costs, *grids)
    moved = [tensor.to(device) for tensor in (target, feedback, costs, *grids)]
    codes, _, _, cost = (tensor.cpu() for tensor in kernels.columns(*moved, problem.scheme.levels))
    if not torch.allclose(cost, wanted[3], rtol=1e-2) or not (codes == wanted[0]).float().mean() > 0.99:
        return f"the codes that it finds column by column differ from the definition's on {device}"
    codes, scales, zeros = (tensor.clone() for tensor in wanted[:3])
    error, inner = target - _value(codes, scales, zeros), mixed @ mixed.T / 64 + torch.eye(64)
    pull = inner @ error
    moved = [tensor.to(device, copy=True) for tensor in (codes, scales, zeros, pull, inner)]
    found, _, gain = (tensor.cpu() for tensor in kernels.descend(*moved, problem.scheme.levels))
    wanted_gain = problem._descend(codes, scales, zeros, error, pull, inner)
    if not (found == codes).float().mean() > 0.99 or not torch.allclose(
        gain.double().sum(), wanted_gain.sum(), rtol=1e-2
    ):
        return f"the codes that it descends to differ from the definition's on {device}"
    return None


def _value(codes, scales, zeros) -> torch.Tensor:
    return (codes - zeros) * scales


def _slices(count: int, length: int):
    length = max(length, 1)
    return (slice(start, min(start + length, count)) for start in range(0, count, length))
