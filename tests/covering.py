"""Fewer cases than a full product, with every combination of a few of its values."""

from collections.abc import Callable, Container, Iterable, Mapping
from itertools import combinations, product

import pytest


def cover(*factors, strength: int = 2, where: Callable[..., bool] = lambda *case: True) -> list[tuple]:
    """Some cases of the product of `factors`: any `strength` values, each of another factor, meet in one of them.

    A fault that shows for one value, or for `strength` values together, shows in them as it would in all. Values that
    may be at fault only together (bits, group size, symmetry) are one factor, a Scheme. where: the cases that there
    are; values that meet in none of them need not meet. Values are hashable; the choice is greedy and always the
    same."""
    numbers: dict[tuple, int] = {}
    masks = {
        case: sum(1 << numbers.setdefault(part, len(numbers)) for part in combinations(enumerate(case), strength))
        for case in product(*factors)
        if where(*case)
    }
    order, chosen, left = list(masks), [], (1 << len(numbers)) - 1
    while left:
        chosen.append(max(masks, key=lambda case: (masks[case] & left).bit_count()))
        left &= ~masks.pop(chosen[-1])
    return sorted(chosen, key=order.index)


def covering(strength: int = 2, **factors) -> pytest.MarkDecorator:
    """`parametrize` over a covering design of arguments. factors: argument -> its values, or name -> value. The id of a
    case has the names of its values, or how they call themselves."""
    named = [
        dict(values) if isinstance(values, Mapping) else {_name(value): value for value in values}
        for values in factors.values()
    ]
    cases = cover(*named, strength=strength)
    values = [tuple(of[name] for of, name in zip(named, case, strict=True)) for case in cases]
    return pytest.mark.parametrize(tuple(factors), values, ids=["-".join(case) for case in cases])


def slow_but(quick: Container, values: Iterable) -> list:
    """`values` for `parametrize`: those in `quick` stand for the others where the slow ones are left out."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def _name(value) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_name, value))
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or value).removeprefix("torch.")
