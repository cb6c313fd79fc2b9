"""The best allocation of a budget: one option for each unit, least cost in all, sizes within a limit.

That is the multiple-choice knapsack problem (Sinha and Zoltners 1979), solved exactly, unit after unit.
A state is (size, cost) of the units so far; of two, the one that is larger and costs more is dropped. The Lagrangian
relaxation says what the rest will cost at least,

    min over options of sum(cost) with sum(size) <= limit   >=   sum over units of min(cost + l * size) - l * limit,

so that states which cannot come below a known solution are dropped too. With the best l few are left.
"""

from collections.abc import Sequence

import numpy as np

# Doublings and halvings that find the multiplier: more than float64 has bits
_STEPS = 200
# Sums of floats in another order differ by this much of the total: states so close to the bound are kept
_ROUNDING = 1e-9


def best_choice(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> list[int] | None:
    """One option of each unit.

    Args:
        costs: By unit and option, finite and not negative.
        sizes: By unit and option, whole numbers.
        limit: Of the sum of sizes.

    Returns:
        The number of the option of each unit: least sum of costs, and of those the least sum of sizes. None where even
        the smallest options are larger than the limit.
    """
    pairs = zip(costs, sizes, strict=True)
    units = [_undominated(np.asarray(cost, np.float64), np.asarray(size, np.int64)) for cost, size in pairs]
    if sum(int(size[-1]) for _, _, size in units) > limit:
        return None
    multiplier = _multiplier(units, limit)
    known = sum(float(cost[at]) for (_, cost, _), at in zip(units, _relaxed(units, multiplier), strict=True))
    least = [float((cost + multiplier * size).min()) for _, cost, size in units]
    ahead = np.cumsum([0.0, *reversed(least)])[::-1]  # of the units from here on
    smallest = np.cumsum([0, *reversed([int(size[-1]) for _, _, size in units])])[::-1]
    state_cost, state_size = np.zeros(1), np.zeros(1, np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, (_, cost, size) in enumerate(units):
        next_cost, next_size = (state_cost[:, None] + cost).ravel(), (state_size[:, None] + size).ravel()
        bound = next_cost + multiplier * (next_size - limit) + ahead[number + 1]
        possible = (bound <= known + _ROUNDING * max(known, abs(multiplier * limit))) & (
            next_size + smallest[number + 1] <= limit
        )
        kept = np.flatnonzero(possible)
        kept = kept[np.lexsort((next_cost[kept], next_size[kept]))]
        below = np.minimum.accumulate(np.concatenate([[np.inf], next_cost[kept][:-1]]))
        kept = kept[next_cost[kept] < below]
        state_cost, state_size = next_cost[kept], next_size[kept]
        trail.append((kept // len(cost), kept % len(cost)))
    at, chosen = int(np.argmin(state_cost)), []
    for (origin, option), (names, _, _) in zip(reversed(trail), reversed(units), strict=True):
        chosen.append(int(names[option[at]]))
        at = int(origin[at])
    return chosen[::-1]


def _undominated(cost: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Options that no other beats in both, as (number, cost, size): ever smaller, ever more costly."""
    order = np.lexsort((size, cost))
    smaller = np.minimum.accumulate(np.concatenate([[np.iinfo(np.int64).max], size[order][:-1]]))
    order = order[size[order] < smaller]
    return order, cost[order], size[order]


def _relaxed(units: list, multiplier: float) -> list[int]:
    """The option of each unit that costs least, if size has a price; the smallest of several."""
    priced = (cost + multiplier * size for _, cost, size in units)
    return [len(price) - 1 - int(np.argmin(price[::-1])) for price in priced]


def _multiplier(units: list, limit: int) -> float:
    """The lowest price of size at which what costs least keeps to the limit."""

    def fits(price: float) -> bool:
        return sum(int(size[at]) for (_, _, size), at in zip(units, _relaxed(units, price), strict=True)) <= limit

    if fits(0.0):
        return 0.0
    high = 1e-12
    for _ in range(_STEPS):
        if fits(high):
            break
        high *= 2
    low = high / 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
