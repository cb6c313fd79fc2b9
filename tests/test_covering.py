"""A covering design holds what it promises, in fewer cases."""

from itertools import combinations, product

import pytest
import torch
from covering import cover, covering, slow_but

FACTORS = (range(4), range(7), "ab", (1.5, None, "x"))


@pytest.mark.parametrize(("strength", "most"), [(1, 7), (2, 32), (3, 110), (4, 252)])
def test_any_values_meet_in_a_case(strength, most):
    cases = cover(*FACTORS, strength=strength)
    for places in combinations(range(4), strength):
        wanted = set(product(*(FACTORS[place] for place in places)))
        assert {tuple(case[place] for place in places) for case in cases} == wanted
    assert len(cases) == len(set(cases)) <= most and set(cases) <= set(product(*FACTORS))
    assert cases == cover(*FACTORS, strength=strength)


def test_values_meet_wherever_a_case_holds_them():
    def where(first, second, *_):
        return first + second < 6

    cases = cover(*FACTORS, where=where)
    assert all(where(*case) for case in cases)
    possible = [case for case in product(*FACTORS) if where(*case)]
    for i, j in combinations(range(4), 2):
        assert {(case[i], case[j]) for case in cases} == {(case[i], case[j]) for case in possible}


def test_cases_are_called_by_their_values():
    mark = covering(dtype=(torch.float16, torch.float32), shape=((1, 2), (3, 4)), kind={"one": 1, "two": 2}).mark
    assert mark.args[0] == ("dtype", "shape", "kind") and len(mark.args[1]) == 4
    assert mark.args[1][0] == (torch.float16, (1, 2), 1) and mark.kwargs["ids"][0] == "float16-1x2-one"


def test_values_that_are_not_quick_are_marked_slow():
    first, second = slow_but(("a",), "ab")
    assert first == "a" and second.values == ("b",) and [mark.name for mark in second.marks] == ["slow"]
