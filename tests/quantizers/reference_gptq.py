"""GPTQ as its paper has it, in float64: one column after the other, each error subtracted from all later columns.

Written apart from lowbit.quantizers.gptq, which it judges: no blocks, the inverse of H instead of a factor of H itself,
nothing in float32. And the data that both run on.
"""

from functools import cache

import torch

from lowbit.numerics.qweight import QuantWeight

# lowbit feeds errors back in float32: a value this close to a tie (in steps of its scale), or an unrounded scale this
# close to another stored value, may go either way
TIE = 1e-3
SCALE_SLACK = 1e-5


def damped(hessian, share):
    """H with `share` of its mean diagonal added to its diagonal."""
    hessian = hessian.double()
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def corrected(weight, hessian, drift, strength=1.0):
    """The weight V that minimises mean ||W f - V x||^2: W E[f x^T] H^-1, or a part of the way there."""
    full = weight.double() @ (drift.double() + hessian) @ torch.linalg.inv(hessian)
    return weight.double() + strength * (full - weight.double())


def objective(target, restored, hessian):
    """float64 [N]: (w - q) H (w - q)^T of each row."""
    error = target.double() - restored.double()
    return torch.einsum("nk,kl,nl->n", error, hessian.double(), error)


def group_order(hessian, group):
    """Groups by their largest diagonal element, and the inputs inside of a group likewise, the largest first."""
    diagonal = hessian.diagonal().tolist()
    groups = [range(start, start + group) for start in range(0, len(diagonal), group)]
    groups.sort(key=lambda inputs: -max(diagonal[k] for k in inputs))
    return [k for inputs in groups for k in sorted(inputs, key=lambda k: -diagonal[k])]


def spans(values, scheme):
    """values [N, g] -> the scales [C, N] that span them, unrounded, C > 1 if there are ties. Symmetric grids have one
    code more below zero than above it: the sign of the scale lets the largest |value| lie on the lowest code."""
    lowest, highest = values.amin(1), values.amax(1)
    if not scheme.sym:
        return ((highest.clamp(min=0) - lowest.clamp(max=0)) / (2**scheme.bits - 1))[None]
    falling, rising = -highest / 2 ** (scheme.bits - 1), -lowest / 2 ** (scheme.bits - 1)
    both = torch.stack(
        [torch.where(highest > -lowest, falling, rising), torch.where(highest > -lowest, rising, falling)]
    )
    tie = (highest + lowest).abs() <= SCALE_SLACK * highest
    return torch.where(tie, both, both[0])


def stored(exact, dtype, followed):
    """The first of `exact` [C, N] in `dtype`, or `followed` where that is as near to one of them."""
    ends = torch.stack([exact * (1 - SCALE_SLACK), exact * (1 + SCALE_SLACK)]).to(dtype)
    if followed is None:
        return exact[0].to(dtype)
    near = ((ends.amin(0) <= followed) & (followed <= ends.amax(0))).any(0)
    return torch.where(near, followed, exact[0].to(dtype))


def nearest(steps, lowest, highest, followed):
    """Integers nearest to `steps`; where that is a tie (see TIE), what `followed` has. -> (integers, number of ties)"""
    found = steps.round().clamp(lowest, highest)
    if followed is None:
        return found, 0
    tie = ((steps - steps.floor() - 0.5).abs() < TIE) & ((followed - found).abs() == 1)
    return torch.where(tie, followed.double(), found), int(tie.sum())


def upper_factor(hessian):
    """U, upper triangular, with U^T U = H^-1."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)


def quantize(weight, upper, scheme, dtype, order=None, followed=None):
    """weight: floating [N, K]. upper: of the damped H with its columns in `order`, the sequence in which they are
    quantized; groups stay together in it. followed: the QuantWeight to judge, whose ties are taken over.
    -> (QuantWeight, number of ties)."""
    weight = weight.double().clone()
    rows, inputs = weight.shape
    group = inputs if scheme.group_size == -1 else scheme.group_size
    order = list(range(inputs)) if order is None else order
    codes = torch.zeros(rows, inputs, dtype=torch.uint8)
    scales, zeros = torch.zeros(rows, inputs // group, dtype=dtype), torch.zeros(rows, inputs // group)
    ties = 0
    for step, k in enumerate(order):
        g = k // group
        if step % group == 0:
            current = weight[:, g * group : (g + 1) * group]
            scales[:, g] = stored(spans(current, scheme), dtype, None if followed is None else followed.scales[:, g])
            zeros[:, g] = 2 ** (scheme.bits - 1)
            if not scheme.sym:
                lowest = -current.amin(1).clamp(max=0) / scales[:, g].double()
                zeros[:, g], more = nearest(
                    lowest, 0, 2**scheme.bits - 1, None if followed is None else followed.zeros[:, g].double()
                )
                ties += more
        scale, zero = scales[:, g].double(), zeros[:, g].double()
        found, more = nearest(
            weight[:, k] / scale + zero,
            0,
            2**scheme.bits - 1,
            None if followed is None else followed.codes[:, k].double(),
        )
        ties += more
        codes[:, k] = found.to(torch.uint8)
        error = (weight[:, k] - (found - zero) * scale) / upper[step, step]
        weight[:, order[step + 1 :]] -= error[:, None] * upper[step, step + 1 :]
    return QuantWeight(codes, scales, scheme, None if scheme.sym else zeros.to(torch.uint8)), ties


def best_scales(target, codes, zeros, group, hessian):
    """float64 [N, G]: the scales that minimise the objective with the codes fixed, by least squares of each row."""
    root = torch.linalg.cholesky(hessian).T  # (w - q) H (w - q)^T = ||root (w - q)||^2
    rows, inputs = codes.shape
    scales = []
    for n in range(rows):
        columns = torch.zeros(inputs, inputs // group, dtype=torch.float64)
        for k in range(inputs):
            columns[k, k // group] = float(codes[n, k]) - float(zeros[n, k // group])
        # gelsd: also where all codes of a group are its zero
        solution = torch.linalg.lstsq(root @ columns, (root @ target[n].double())[:, None], driver="gelsd")
        scales.append(solution.solution[:, 0])
    return torch.stack(scales)


@cache
def inputs(tokens, features, seed=0):
    """float64 [tokens, features], correlated: the spectrum decays by e^3, and the mean is not zero."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(0, -3, features, dtype=torch.float64).exp()
    rotation = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64, generator=rng))[0]
    mean = 0.3 * torch.randn(features, dtype=torch.float64, generator=rng)
    return torch.randn(tokens, features, dtype=torch.float64, generator=rng) * spectrum @ rotation + mean


def second_moment(x):
    return x.T @ x / len(x)


def heavy_tailed(rows, columns, dtype=torch.float32, seed=1):
    """Student-t with three degrees of freedom, rows of many sizes."""
    normal = torch.randn(4, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sizes = 0.02 * torch.logspace(0, 1, rows, dtype=torch.float64).unsqueeze(1)
    return (sizes * normal[0] / normal[1:].square().mean(0).sqrt()).to(dtype)
