"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) and what makes it better: error feedback, then refinement.

The quantized weight Q of a linear minimises, over the inputs x of the calibration tokens,

    tr((W - Q) H (W - Q)^T) = mean of ||(W - Q) x||^2,          H = mean of x x^T.

In order:

1. Target. Inputs have drifted, x = f - d, since earlier layers are quantized; the output to reach is W f. The best
   weight for that without rounding is W + W D H^-1 with D = mean of (f - x) x^T (GPTAQ, arXiv:2504.02692; Qronos,
   arXiv:2505.11695). Quantizing it minimises the error against the original outputs.
2. Damping: a share of its mean is added to the diagonal of H, which stands for the tokens that calibration did not see.
3. Order: groups with the largest inputs first, and inside of a group the largest inputs first ("group-aware" order). A
   group stays a set of consecutive inputs: nothing has to be stored about the order.
4. Factor. H = R R^T with R upper triangular, so that the error is ||(W - Q) R||^2, a sum over columns in which column
   k only depends on columns j <= k. R is the inverse of the paper's factor, chol(H^-1)^T, whose rows divided by their
   diagonal feed errors forward; M = R / diag(R) gathers the same feedback, without inverting anything:
       t_k = w_k + sum over j < k of (w_j - q_j) M_jk,        q_k = nearest grid point to t_k,
       error of column k = R_kk^2 (t_k - q_k)^2.
5. Grids. When its turn comes, each group tries some scales and zero points around the range of its *current* targets,
   runs its own columns on each, feedback included, and every row keeps the cheapest.
6. Refinement, some sweeps of: scales of all groups in closed form with the codes fixed (least squares; cf. "two-stage
   grid optimization", arXiv:2602.02126), then each code to its best value with everything else fixed (coordinate
   descent; QuantEase, arXiv:2309.01885). Neither can raise the error.

Everything is done for all rows at once, on transposed matrices [K, N]: a column of the paper is a contiguous row here.
"""

from dataclasses import dataclass

import torch

from lowbit.grid import quantize_nearest
from lowbit.quantizers import Between
from lowbit.qweight import QuantWeight
from lowbit.scheme import Scheme

needs = ("hessian", "drift")
OPTIONS = {
    "order": ("group", "none"),
    "scale_search": ("columns", "minmax"),
    "damping": Between(0.03, 0.0, 10.0),
    "drift": Between(1.0, 0.0, 1.0),
    "sweeps": Between(3, 0, 100),
}

# Damping is raised by this factor, at most so often, until H can be factored
_DAMPING_STEPS, _DAMPING_FACTOR, _LEAST_DAMPING = 6, 10.0, 1e-6
# Feedback inside of a block of this many columns is gathered column by column, beyond it by matrix products
_BLOCK = 32
# Elements of the work arrays of a slice of rows: what stays in a CPU's caches
_SLICE_ELEMENTS = 2**21
# Ranges that are tried for each group, and shifts of its zero point, by bits
_SHRINKS = (1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SHIFTS = (0, 1, -1)
_LONGEST_SEARCHED_GROUP = 512
# Of the mean diagonal, in the least-squares problem of the scales
_RIDGE = 1e-4
# Columns whose gradient is brought up to date together
_WIDEST_DESCENT = 128


def quantize(weight, stats, scheme, options):
    """weight: floating [N, K]. stats: "hessian" floating [K, K], "drift" the same or None. -> (QuantWeight, notes).

    notes: "objective", stage -> float64 [N], the error of each row after it, relative to that of a row of zeros;
    "damping", the share of the mean diagonal that was added. Where H cannot be factored at any damping (NaN, infinite):
    round to nearest, and notes["fallback"] says so.
    """
    hessian = stats["hessian"].double()
    dead = hessian.diagonal() <= 0  # inputs that are always zero: any code does, and that of weight zero is best
    hessian = hessian + torch.diag(dead.double() * hessian.diagonal().clamp_min(0).mean().clamp_min(1e-30))
    hessian, damping = _damped(hessian, options["damping"])
    if hessian is None:
        return quantize_nearest(weight, scheme, "mse"), {"fallback": "rtn: the Hessian is not finite"}
    target = weight.double()
    target[:, dead] = 0
    if options["drift"] and stats.get("drift") is not None:
        target = target + options["drift"] * torch.cholesky_solve(
            (target @ stats["drift"].double()).T, torch.linalg.cholesky(hessian)
        ).T
    group = scheme.group_of(weight.shape[1])
    order = _order(hessian.diagonal(), group, options["order"])
    hessian = hessian[order][:, order]
    factor = _factor(hessian)
    problem = _Problem(target[:, order].T.float().contiguous(), hessian.float(), group, scheme, weight.dtype)
    solution = problem.error_feedback(factor, options["scale_search"])
    objective = {"gptq": problem.error(solution)}
    for sweep in range(1, options["sweeps"] + 1):
        solution = problem.refit_scales(solution)
        objective[f"scales {sweep}"] = problem.error(solution)
        solution = problem.descend(solution)
        objective[f"codes {sweep}"] = problem.error(solution)
    energy = problem.energy()
    objective = {stage: error / energy for stage, error in objective.items()}
    return solution.in_order(order, group, scheme, weight.dtype), {"objective": objective, "damping": damping}


def _damped(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float]:
    """The Hessian with `damping` times its mean diagonal added to its diagonal, more if that is not positive definite."""
    mean = hessian.diagonal().mean()
    for _ in range(_DAMPING_STEPS):
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        _, failed = torch.linalg.cholesky_ex(damped)
        if not failed and damped.isfinite().all():
            return damped, damping
        damping = max(damping, _LEAST_DAMPING) * _DAMPING_FACTOR
    return None, damping


def _order(diagonal: torch.Tensor, group: int, how: str) -> torch.Tensor:
    """int64 [K]: the columns in the order in which they are quantized; groups stay together."""
    if how == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    groups = diagonal.view(-1, group)
    first = torch.argsort(groups.amax(1), descending=True, stable=True)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    return (first[:, None] * group + inside[first]).flatten()


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    """R, upper triangular, with R R^T = hessian: Cholesky from the last column to the first."""
    return torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)


@dataclass
class _Solution:
    """In the order of quantization: codes and error (W - Q) float32 [K, N], scales and zeros float32 [G, N]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    error: torch.Tensor

    def in_order(self, order: torch.Tensor, group: int, scheme: Scheme, dtype: torch.dtype) -> QuantWeight:
        columns = torch.argsort(order)
        groups = torch.argsort(order.view(-1, group)[:, 0])
        codes = self.codes[columns].T.to(torch.int16).to(torch.uint8).contiguous()
        zeros = None if scheme.sym else self.zeros[groups].T.to(torch.uint8).contiguous()
        return QuantWeight(codes, self.scales[groups].T.to(dtype).contiguous(), scheme, zeros)


class _Problem:
    """Minimise, for each column n of W [K, N], (w - q)^T H (w - q) over codes, scales and zeros of groups."""

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, group: int, scheme: Scheme, dtype: torch.dtype):
        self.weight, self.hessian, self.group, self.scheme, self.dtype = weight, hessian, group, scheme, dtype
        self.top = scheme.levels - 1

    def error(self, solution: _Solution) -> torch.Tensor:
        """float64 [N]"""
        return _quadratic(self.hessian, solution.error)

    def energy(self) -> torch.Tensor:
        return _quadratic(self.hessian, self.weight).clamp_min(1e-30)

    def error_feedback(self, factor: torch.Tensor, scale_search: str) -> _Solution:
        diagonal = factor.diagonal()
        feedback, cost = (factor / diagonal).float(), diagonal.square().float()
        inputs, rows = self.weight.shape
        groups = inputs // self.group
        codes, error = torch.empty_like(self.weight), torch.empty_like(self.weight)
        scales, zeros = self.weight.new_empty(groups, rows), self.weight.new_empty(groups, rows)
        searched = scale_search == "columns" and self.group <= _LONGEST_SEARCHED_GROUP
        for number in range(groups):
            block = slice(number * self.group, (number + 1) * self.group)
            target = self.weight[block] + feedback[: block.start, block].T @ error[: block.start]
            # in slices of rows: the columns of a group pass over the same few arrays again and again
            for part in _slices(rows, _SLICE_ELEMENTS // (self.group * (len(_SHRINKS) if searched else 1))):
                tried = self._grids(target[:, part], searched)
                found = self._columns(target[:, part], feedback[block, block], cost[block], *tried)
                codes[block, part], scales[number, part], zeros[number, part] = found
            error[block] = self.weight[block] - self._value(codes[block], scales[number], zeros[number])
        return _Solution(codes, scales, zeros, error)

    def _grids(self, target: torch.Tensor, searched: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [C, N] to try for targets [g, N] of one group."""
        shrinks = target.new_tensor(_SHRINKS if searched else (1.0,)).unsqueeze(1)
        if self.scheme.sym:
            # all 2^bits codes: the largest |w| lies on the lowest code, whichever sign that takes
            largest = target.gather(0, target.abs().argmax(0, keepdim=True))
            scales = self._stored(-largest * shrinks / self.scheme.middle)
            return scales, torch.full_like(scales, self.scheme.middle)
        low, high = target.amin(0).clamp(max=0) * shrinks, target.amax(0).clamp(min=0) * shrinks
        scales = self._stored((high - low) / self.top)
        zeros = (-low / scales).round().clamp(0, self.top)
        if searched and self.scheme.bits <= 3:
            zeros = torch.cat([(zeros + shift).clamp(0, self.top) for shift in _SHIFTS])
            scales = scales.repeat(len(_SHIFTS), 1)
        return scales, zeros

    def _stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as a file will hold them, never zero and never infinite."""
        limits = torch.finfo(self.dtype)
        least = limits.tiny * limits.eps if self.dtype == torch.float16 else limits.tiny
        sign = torch.where(scales < 0, -1.0, 1.0)
        return (sign * scales.abs().clamp(least, limits.max)).to(self.dtype).float()

    def _nearest(self, target, scales, zeros) -> torch.Tensor:
        return (target / scales).round_().add_(zeros).clamp_(0, self.top)

    @staticmethod
    def _value(codes, scales, zeros) -> torch.Tensor:
        return (codes - zeros) * scales

    def _columns(self, target, feedback, cost, scales, zeros):
        """Run the columns of one group, targets [g, N], on C grids [C, N]; per row the codes [g, N] and the grid [N] of
        the least error."""
        length, rows = target.shape
        tried = len(scales)
        codes, error = target.new_empty(length, tried, rows), target.new_empty(length, tried, rows)
        total = target.new_zeros(tried, rows)
        for start in range(0, length, _BLOCK):
            stop = min(start + _BLOCK, length)
            wanted = target[start:stop, None, :].expand(-1, tried, -1)
            if start:
                wanted = wanted + (feedback[:start, start:stop].T @ error[:start].flatten(1)).view(-1, tried, rows)
            for k in range(start, stop):
                column = wanted[k - start]
                if k > start:
                    column = column + (feedback[start:k, k] @ error[start:k].flatten(1)).view(tried, rows)
                codes[k] = self._nearest(column, scales, zeros)
                value = self._value(codes[k], scales, zeros)
                total.addcmul_(column - value, (column - value) * cost[k])
                error[k] = target[k] - value
        if tried == 1:
            return codes[:, 0], scales[0], zeros[0]
        best = total.argmin(0, keepdim=True)
        codes = codes.gather(1, best.expand(length, 1, rows))[:, 0]
        return codes, scales.gather(0, best)[0], zeros.gather(0, best)[0]

    def refit_scales(self, solution: _Solution) -> _Solution:
        """All scales of a row by least squares, its codes fixed: (C^T H C) s = C^T H w, where column g of C holds the
        codes less their zero in group g, and nothing elsewhere. Rows that gain nothing keep their scales."""
        groups, rows = solution.scales.shape
        scales = solution.scales.clone()
        for part in _slices(rows, max(1, 4 * _SLICE_ELEMENTS // (groups * groups))):
            steps = (solution.codes[:, part].view(groups, self.group, -1) - solution.zeros[:, None, part])
            right = (steps * (self.hessian @ self.weight[:, part]).view_as(steps)).sum(1).T
            left = steps.new_empty(steps.shape[2], groups, groups)
            for g in range(groups):
                block = slice(g * self.group, (g + 1) * self.group)
                left[:, :, g] = (steps * (self.hessian[:, block] @ steps[g]).view_as(steps)).sum(1).T
            # a ridge towards the present scales: groups whose codes are all zero leave the system singular
            ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30)
            left.diagonal(dim1=1, dim2=2).add_(ridge)
            right = right + ridge * solution.scales[:, part].T
            scales[:, part] = torch.linalg.solve(left.double(), right.double()).float().T
        scales = torch.where(scales.isfinite(), scales, solution.scales)
        return self._kept_where_better(solution, self._stored(scales))

    def _kept_where_better(self, solution: _Solution, scales: torch.Tensor) -> _Solution:
        steps = solution.codes.view(len(scales), self.group, -1) - solution.zeros.unsqueeze(1)
        error = self.weight - (steps * scales.unsqueeze(1)).view_as(self.weight)
        better = _quadratic(self.hessian, error) < _quadratic(self.hessian, solution.error)
        return _Solution(
            solution.codes,
            torch.where(better, scales, solution.scales),
            solution.zeros,
            torch.where(better, error, solution.error),
        )

    def descend(self, solution: _Solution) -> _Solution:
        """One pass of coordinate descent: each code to the best value while all others stay."""
        codes, error = solution.codes.clone(), solution.error.clone()
        diagonal = self.hessian.diagonal()
        for number in range(len(solution.scales)):
            start = number * self.group
            scales, zeros = solution.scales[number], solution.zeros[number]
            for first in range(start, start + self.group, _WIDEST_DESCENT):
                block = slice(first, min(first + _WIDEST_DESCENT, start + self.group))
                inner = self.hessian[block, block]
                # half the gradient with respect to each weight of the block, negated
                pull = self.hessian[block] @ error
                moved = torch.zeros_like(pull)
                for k in range(block.stop - block.start):
                    now = self._value(codes[first + k], scales, zeros)
                    force = pull[k] - inner[k, :k] @ moved[:k] if k else pull[k]
                    codes[first + k] = self._nearest(now + force / diagonal[first + k], scales, zeros)
                    moved[k] = self._value(codes[first + k], scales, zeros) - now
                error[block] -= moved
        return _Solution(codes, solution.scales, solution.zeros, error)


def _quadratic(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """float64 [N]: c^T H c of each column of [K, N]."""
    return ((hessian @ columns) * columns).sum(0, dtype=torch.float64)


def _slices(count: int, length: int):
    length = max(length, 1)
    return (slice(start, min(start + length, count)) for start in range(0, count, length))
