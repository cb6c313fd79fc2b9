"""The knapsack: exactly the best choice, by trying all of them."""

import itertools

import numpy as np
import pytest

from lowbit.quantization.allocation.solve import best_choice


def by_trying(costs, sizes, limit):
    """(cost, size) of the best choice, None if none fits."""
    choices = itertools.product(*(range(len(options)) for options in costs))
    totals = ((sum(c[k] for c, k in zip(costs, chosen, strict=True)),
               sum(s[k] for s, k in zip(sizes, chosen, strict=True))) for chosen in choices)  # fmt: skip
    return min((total for total in totals if total[1] <= limit), default=None)


@pytest.mark.parametrize("seed", range(300))
def test_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    units = int(rng.integers(1, 6))
    # few different values: equal costs and equal sizes are where choices go wrong
    costs = [rng.choice([0.0, 0.5, 1.0, 2.0, 7.0], int(rng.integers(1, 5))) for _ in range(units)]
    sizes = [rng.integers(1, 9, len(options)) for options in costs]
    limit = int(rng.integers(1, 9 * units))
    chosen = best_choice(costs, sizes, limit)
    expected = by_trying(costs, sizes, limit)
    if expected is None:
        assert chosen is None
        return
    cost = sum(options[at] for options, at in zip(costs, chosen, strict=True))
    size = sum(int(options[at]) for options, at in zip(sizes, chosen, strict=True))
    assert (pytest.approx(cost), size) == expected


def test_sizes_are_counted_exactly_however_large():
    """One byte too much is too much, also of a terabyte."""
    sizes = [[2**40, 2**40 + 1], [2**40, 2**40 + 1]]
    assert best_choice([[1.0, 0.0], [1.0, 0.5]], sizes, 2**41 + 1) == [1, 0]
    assert best_choice([[1.0, 0.0], [1.0, 0.5]], sizes, 2**41 - 1) is None


def test_a_model_of_many_units_is_not_too_many():
    rng = np.random.default_rng(0)
    bits = np.array([2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 8.25])
    weights = rng.choice([589824, 262144, 1572864], 200)
    sizes = (weights[:, None] * bits / 8).astype(int)
    costs = np.exp(rng.normal(0, 1.5, 200))[:, None] * 4.0**-bits
    limit = int(3.5 * weights.sum() / 8)
    chosen = best_choice(costs, sizes, limit)
    taken = sizes[range(200), chosen].sum()
    assert limit - int(weights.min()) // 8 < taken <= limit
    # no exchange of two units for the same room is better
    spent = costs[range(200), chosen].sum()
    relaxed = (
        min((costs + price * sizes).min(1).sum() - price * limit for price in np.geomspace(1e-10, 1e-5, 4000)),
        max((costs + price * sizes).min(1).sum() - price * limit for price in np.geomspace(1e-10, 1e-5, 4000)),
    )
    assert relaxed[1] <= spent <= relaxed[1] * 1.001
