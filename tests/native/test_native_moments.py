"""moments.c against products in float64: shapes that fill no tile, the half that is left out, threads."""

import pytest
import torch

from lowbit.native import moments
from lowbit.native.build import library

pytestmark = pytest.mark.usefixtures("compiler")
# tokens, rows, columns
SHAPES = [(1, 1, 1), (2, 48, 48), (255, 37, 100), (257, 96, 49), (513, 144, 7), (600, 5, 144)]


@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_sums_of_outer_products(tokens, rows, columns, level, nan_poison):
    a, b = torch.randn(tokens, rows).bfloat16(), torch.randn(tokens, columns).bfloat16()
    sums = torch.randn(rows, columns)
    exact = sums.double() + a.double().T @ b.double()
    size = sums.double().abs() + a.double().abs().T @ b.double().abs()
    moments.add_outer(sums, a, b)
    # products are exact, each addition of a sum rounds; a pair of products may be rounded once more
    assert ((sums - exact).abs() <= size * 2**-24 * (tokens + 2)).all()


@pytest.mark.parametrize("features", [1, 37, 48, 97, 144])
def test_of_itself_the_lower_triangle(features, level, nan_poison):
    a = torch.randn(300, features).bfloat16()
    sums, whole = torch.zeros(features, features), torch.zeros(features, features)
    moments.add_outer(sums, a, a)
    moments.add_outer(whole, a, a.clone())
    assert torch.equal(sums.tril(), whole.tril())


def test_the_number_of_threads_changes_nothing(level):
    a, before, made = torch.randn(1000, 200).bfloat16(), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(torch.zeros(200, 200))
            moments.add_outer(made[-1], a, a)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_parts_of_larger_matrices():
    large, sums = torch.randn(64, 50).bfloat16(), torch.zeros(20, 30)
    moments.add_outer(sums, large[:, :20], large[:, 20:])
    torch.testing.assert_close(sums, large[:, :20].float().T @ large[:, 20:].float())


def test_what_does_not_fit_is_refused():
    a, sums = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(4, 4)
    for wrong in ((sums[:, :3], a, a), (sums.double(), a, a), (sums.T[:2].T, a, a[:, :2]), (sums, a.float(), a)):
        with pytest.raises(ValueError, match="expected"):
            moments.add_outer(*wrong)
    with pytest.raises(ValueError, match="8 and 7 tokens"):
        moments.add_outer(sums, a, a[:7])


def test_only_where_the_processor_has_dot_products_of_bfloat16(on_level):
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert moments.is_fast(x, x) == (library().level == "avx512bf16")
    assert not moments.is_fast(x, x.float())
    on_level("portable")
    assert not moments.is_fast(x)
