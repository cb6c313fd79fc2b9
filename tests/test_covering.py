"""A covering design holds what it promises, in fewer cases."""

from itertools import combinations, product

import pytest
from covering import cover


@pytest.mark.parametrize(("strength", "most"), [(1, 7), (2, 32), (3, 110), (4, 252)])
def test_any_values_meet_in_a_case(strength, most):
    factors = (range(4), range(7), "ab", (1.5, None, "x"))
    cases = cover(*factors, strength=strength)
    for places in combinations(range(4), strength):
        wanted = set(product(*(factors[place] for place in places)))
        assert {tuple(case[place] for place in places) for case in cases} == wanted
    assert len(cases) == len(set(cases)) <= most and set(cases) <= set(product(*factors))
    assert cases == cover(*factors, strength=strength)
