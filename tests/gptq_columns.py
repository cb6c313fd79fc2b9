"""The loops of GPTQ over the columns of a group, column by column in any dtype, and problems for them: what kernels in
Triton and in C are held to."""

import torch

from lowbit.numerics.scheme import Scheme
from lowbit.quantizers.gptq_factor import factored
from lowbit.quantizers.gptq_grids import spanning

# Float32 that adds in another order may round a value this close to the middle between two codes, in steps, the other
# way, and take another grid whose cost is this close
TIE, SAME_COST = 1e-4, 1e-5
# bits, group, symmetric, rows, grids
CASES = [
    (2, 16, True, 33, 5),
    (2, 16, False, 7, 27),
    (2, 128, False, 1, 1),
    (3, 16, False, 130, 9),
    (3, 64, False, 33, 9),
    (3, 32, True, 1, 5),
    (4, 16, True, 7, 27),
    (4, 128, True, 33, 5),
    (4, 64, False, 130, 1),
    (4, 43, False, 33, 5),
    (8, 16, False, 1, 1),
    (8, 64, True, 7, 5),
    (8, 128, False, 130, 1),
    (8, 32, True, 130, 9),
    (8, 256, False, 7, 1),
]


def hessian_of(group):
    """float32 [g, g] of correlated inputs, a little damped."""
    spectrum = torch.linspace(0, -2, group).exp()
    x = torch.randn(2 * group, group) * spectrum @ torch.linalg.qr(torch.randn(group, group))[0]
    hessian = x.T @ x / len(x)
    return hessian + 0.02 * hessian.diagonal().mean() * torch.eye(group)


def problem_of(bits, group, sym, rows, tried):
    """-> Hessian [g, g], target [g, N], (feedback, costs) of its factor, (scales, zeros) [C, N] of grids."""
    hessian, target = hessian_of(group), torch.randn(group, rows) * torch.linspace(0.01, 0.1, rows)
    shifts = 3 if not sym and bits <= 3 and tried > 1 else 1  # what `spanning` makes of each range it is asked for
    shrinks = tuple(torch.linspace(1.15, 0.7, tried // shifts).tolist())
    grids, factor = spanning(target, shrinks, Scheme(bits, -1, sym), torch.bfloat16), factored(hessian)
    assert len(grids) == tried
    assert not sym or rows == 1 or (grids.scales < 0).any()
    return hessian, target, (factor.feedback, factor.costs), (grids.scales, grids.zeros)


def column_by_column(target, feedback, costs, scale, zero, top):
    """On one grid [N], in the dtype of `target`: steps [g, N], cost [N], and how close a value came to a tie [N]."""
    errors, steps, cost, margin = [], [], torch.zeros_like(scale), torch.full_like(scale, 0.5)
    for k in range(len(target)):
        fed = torch.zeros_like(scale)
        for j in range(k):
            fed = fed + feedback[j, k] * errors[j]
        now = target[k] + fed
        aim = now / scale
        step = aim.round().clamp(-zero, top - zero)
        inside = (aim > -zero - TIE) & (aim < top - zero + TIE)
        margin = torch.where(inside, torch.minimum(margin, (aim - aim.floor() - 0.5).abs()), margin)
        off = now - step * scale
        cost = cost + costs[k] * off * off
        errors.append(target[k] - step * scale)
        steps.append(step)
    return torch.stack(steps), cost, margin


def reference_columns(target, feedback, costs, scales, zeros, top):
    """What `columns` returns, and bool [N]: rows in which nothing is close to a tie."""
    tried = [column_by_column(target, feedback, costs, *grid, top) for grid in zip(scales, zeros, strict=True)]
    cost = torch.stack([run[1] for run in tried])
    best, row = cost.argmin(0), torch.arange(target.shape[1])
    scale, zero = scales[best, row], zeros[best, row]
    rivals = (cost <= cost[best, row] * (1 + SAME_COST)) & ((scales != scale) | (zeros != zero))
    firm = (torch.stack([run[2] for run in tried]) > TIE).all(0) & ~rivals.any(0)
    codes = torch.stack([run[0] for run in tried])[best, :, row].T + zero
    return (codes, scale, zero, cost[best, row]), firm


def reference_descend(codes, scale, zero, descent, inner, top):
    """What `descend` returns, in the dtype of `descent`, and bool [N]: rows in which nothing is close to a tie."""
    found, moves, gain, margin = [], [], torch.zeros_like(scale), torch.full_like(scale, 0.5)
    for k in range(len(codes)):
        taken = torch.zeros_like(scale)
        for j in range(k):
            taken = taken + inner[j, k] * moves[j]
        force, now = descent[k] - taken, (codes[k] - zero) * scale
        aim = (now + force / inner[k, k]) / scale
        step = aim.round().clamp(-zero, top - zero)
        margin = torch.minimum(margin, (aim - aim.floor() - 0.5).abs())
        moves.append(step * scale - now)
        gain = gain + moves[k] * (2 * force - inner[k, k] * moves[k])
        found.append(step + zero)
    return (torch.stack(found), torch.stack(moves), gain), margin > TIE


def double(*tensors):
    return [tensor.double() for tensor in tensors]
