"""gptq.c against the loops over columns in float64, where nothing is close to a tie, and what it must not depend on."""

import pytest
import torch
from gptq_columns import CASES, double, problem_of, reference_columns, reference_descend

from lowbit.native import gptq as kernels

pytestmark = pytest.mark.usefixtures("compiler")


def within_nan(matrix):
    """The same values as a part of a larger matrix of NaN."""
    padded = torch.full((matrix.shape[0] + 3, matrix.shape[1] + 5), float("nan"))
    padded[2:-1, 4:-1] = matrix
    return padded[2:-1, 4:-1]


def descending(bits, group, sym, rows):
    inner, target, _, (scales, zeros) = problem_of(bits, group, sym, rows, 1)
    codes = ((target / scales[0]).round() + zeros[0]).clamp(0, 2**bits - 1)
    error = target - (codes - zeros[0]) * scales[0]
    return codes, scales[0], zeros[0], inner @ error, inner


@pytest.mark.parametrize(("bits", "group", "sym", "rows", "tried"), CASES)
def test_columns(bits, group, sym, rows, tried, level, nan_poison):
    _, target, (feedback, costs), grids = problem_of(bits, group, sym, rows, tried)
    # what is below the diagonal is never read
    upper = torch.where(torch.ones_like(feedback).triu(1) > 0, feedback, float("nan"))
    given = within_nan(target), upper, costs, *(within_nan(part) for part in grids)
    codes, scales, zeros, cost = kernels.columns(*given, 2**bits)
    exact, firm = reference_columns(*double(target, feedback, costs, *grids), 2**bits - 1)
    assert firm.sum() >= rows // 3
    assert torch.equal(codes[:, firm], exact[0][:, firm].float())
    assert torch.equal(scales[firm], exact[1][firm].float()) and torch.equal(zeros[firm], exact[2][firm].float())
    # a target of up to 2^(bits - 1) steps is rounded to 24 bits, and what is left of it, part of a step, is squared
    torch.testing.assert_close(cost[firm].double(), exact[3][firm], rtol=max(1e-5, 2.0 ** (bits - 22)), atol=0)
    assert ((codes == codes.round()) & (codes >= 0) & (codes < 2**bits)).all()


@pytest.mark.parametrize(
    ("bits", "group", "sym", "rows"),
    [(2, 16, False, 33), (3, 64, True, 7), (4, 128, False, 33), (4, 43, False, 1), (8, 32, True, 130)],
)
def test_descend(bits, group, sym, rows, level, nan_poison):
    codes, scale, zero, descent, inner = descending(bits, group, sym, rows)
    found, moved, gain = kernels.descend(within_nan(codes), scale, zero, within_nan(descent), inner, 2**bits)
    exact, firm = reference_descend(*double(codes, scale, zero, descent, inner), 2**bits - 1)
    assert firm.sum() >= rows // 3
    assert torch.equal(found[:, firm], exact[0][:, firm].float())
    torch.testing.assert_close(moved, (found - codes) * scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gain[firm].double(), exact[2][firm], rtol=1e-3, atol=1e-5 * float(exact[2].max()))


def test_the_number_of_threads_changes_nothing(level):
    _, target, (feedback, costs), grids = problem_of(3, 32, False, 130, 9)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append((
                *kernels.columns(target, feedback, costs, *grids, 8),
                *kernels.descend(*descending_of_fixed(), 8),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def descending_of_fixed():
    torch.manual_seed(0)
    return descending(3, 32, False, 130)
