"""The GPTQ kernels against plain torch, column by column: in float32 with one rounding per operation, which they must
equal bit for bit, in float64, and against the loops of lowbit.quantizers.gptq_loops that they stand in for."""

import pytest
import torch

pytest.importorskip("triton")

from gptq_columns import CASES, double, hessian_of, problem_of, reference_columns, reference_descend
from triton import knobs

from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import checked_options, gptq, gptq_kernels, gptq_loops
from lowbit.quantizers.gptq_factor import Factor
from lowbit.quantizers.gptq_grids import Grid
from lowbit_kernels import gptq as kernels

pytestmark = pytest.mark.slow

if not torch.cuda.is_available() and not knobs.runtime.interpret:
    pytest.skip("triton was imported before its interpreter was asked for", allow_module_level=True)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time does not depend on how many rows a program has: all in one, but where a test says else."""
    if knobs.runtime.interpret:
        monkeypatch.setattr(kernels, "_FEWEST_ROWS", 256)
        monkeypatch.setattr(kernels, "_MOST_ROWS", 256)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def identical(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "group", "sym", "rows", "tried"), CASES)
def test_columns(bits, group, sym, rows, tried, device):
    _, target, (feedback, costs), grids = problem_of(bits, group, sym, rows, tried)
    arguments = (target, feedback, costs, *grids)
    actual = kernels.columns(*on(device, *arguments), 2**bits)
    identical(actual, reference_columns(*arguments, 2**bits - 1)[0])

    codes, scale, zero, cost = (tensor.cpu() for tensor in actual)
    exact, firm = reference_columns(*double(*arguments), 2**bits - 1)
    # a target of up to 2^(bits - 1) steps is rounded to 24 bits, and what is left of it, part of a step, is squared
    rounding = max(1e-5, 2.0 ** (bits - 22))
    assert firm.sum() >= rows // 3
    plain = gptq_loops.round_columns(target, Factor(feedback, costs), Grid(*grids), 2**bits)
    for other in (exact, (plain.codes, plain.grid.scales, plain.grid.zeros, plain.cost)):
        assert torch.equal(codes[:, firm], other[0][:, firm].float())
        assert torch.equal(scale[firm], other[1][firm].float()) and torch.equal(zero[firm], other[2][firm].float())
        torch.testing.assert_close(cost[firm].double(), other[3][firm].double(), rtol=rounding, atol=0)


@pytest.mark.parametrize(
    ("bits", "group", "sym", "rows"),
    [(2, 16, False, 33), (3, 64, True, 7), (4, 128, False, 33), (4, 43, False, 1), (8, 32, True, 130)],
)
def test_descend(bits, group, sym, rows, device):
    inner, target, _, (scales, zeros) = problem_of(bits, group, sym, rows, 1)
    scale, zero, top = scales[0], zeros[0], 2**bits - 1
    codes = ((target / scale).round() + zero).clamp(0, top)
    error = target - (codes - zero) * scale
    arguments = (codes, scale, zero, inner @ error, inner)
    actual = kernels.descend(*on(device, *arguments), 2**bits)
    identical(actual, reference_descend(*arguments, top)[0])

    found, moved, gain = (tensor.cpu() for tensor in actual)
    assert rows == 1 or (found != codes).any()
    torch.testing.assert_close(moved, (found - codes) * scale, rtol=1e-5, atol=1e-6)
    before, after = (torch.einsum("kn,kl,ln->n", e, inner.double(), e) for e in double(error, error - moved))
    torch.testing.assert_close(gain.double(), before - after, rtol=1e-3, atol=1e-5 * float(before.max()))

    exact, firm = reference_descend(*double(*arguments), top)
    assert firm.sum() >= rows // 3
    plain = gptq_loops.descend(codes, Grid(scale, zero), inner @ error, inner, 2**bits)
    assert torch.equal(found[:, firm], exact[0][:, firm].float())
    assert torch.equal(found[:, firm], plain.codes[:, firm])


def within_nan(matrix):
    """The same values as a part of a larger matrix of NaN."""
    padded = torch.full((len(matrix) + 3, matrix.shape[1] + 5), float("nan"), device=matrix.device)
    padded[2:-1, 4:-1] = matrix
    return padded[2:-1, 4:-1]


@pytest.mark.parametrize(("group", "rows"), [(16, 33), (20, 17)])
def test_parts_of_larger_matrices_over_several_programs(group, rows, device, monkeypatch):
    monkeypatch.setattr(kernels, "_TILE", 256)
    monkeypatch.setattr(kernels, "_FEWEST_ROWS", 8)
    hessian, target, (feedback, costs), (scales, _) = problem_of(4, group, True, rows, 5)
    zeros = torch.full((1, rows), 8.0).expand(5, -1)  # the same row for every grid
    target, feedback, costs, scales, zeros, inner = on(device, target, feedback, costs, scales, zeros, hessian)
    upper = torch.where(torch.ones_like(feedback).triu(1) > 0, feedback, float("nan"))
    whole = reference_columns(target.cpu(), feedback.cpu(), costs.cpu(), scales.cpu(), zeros.cpu(), 15)[0]
    parts = [within_nan(matrix) for matrix in (target, upper)]
    chosen = kernels.columns(*parts, costs, within_nan(scales), zeros, 16)
    identical(chosen, whole)

    codes, scale, zero, _ = chosen
    descent = inner @ (target - (codes - zero) * scale)
    whole = kernels.descend(codes, scale, zero, descent, inner, 16)
    upper = torch.where(torch.ones_like(inner).triu() > 0, inner, float("nan"))
    parts = [within_nan(matrix) for matrix in (codes, descent, upper)]
    identical(kernels.descend(parts[0], scale, zero, *parts[1:], 16), [tensor.cpu() for tensor in whole])


def test_halves_go_to_even_and_what_is_out_of_range_to_its_end(device):
    steps = torch.tensor([-9.0, -8.5, -7.5, -2.5, -1.5, -0.5, -0.25, 0.0, 0.5, 1.5, 2.5, 6.5, 7.5, 8.0, 1e30, -1e30])
    scale = torch.tensor([0.25, -0.5, 4.0])
    arguments = (steps[:, None] * scale, torch.zeros(16, 16), torch.ones(16), scale[None], torch.full((1, 3), 8.0))
    codes = kernels.columns(*on(device, *arguments), 16)[0].cpu()
    expected = torch.tensor([-8.0, -8, -8, -2, -2, 0, 0, 0, 0, 2, 2, 6, 7, 7, 7, -8]) + 8
    assert torch.equal(codes, expected[:, None].expand(-1, 3))


def test_the_first_of_the_cheapest_grids(device):
    target, scales = torch.tensor([[0.5, 3.0]]), torch.tensor([[1.0, 2.0], [-1.0, 1.0], [1.0, -1.0]])
    arguments = (target, torch.ones(1, 1), torch.ones(1), scales, torch.full((3, 2), 4.0))
    codes, scale, _, cost = kernels.columns(*on(device, *arguments), 8)
    assert codes.tolist() == [[4.0, 7.0]] and scale.tolist() == [1.0, 1.0] and cost.tolist() == [0.25, 0.0]


def test_no_rows(device):
    empty, grid = torch.empty(16, 0, device=device), torch.empty(3, 0, device=device)
    square = torch.eye(16, device=device)
    found = kernels.columns(empty, square, square[0], grid, grid, 16)
    assert [tuple(tensor.shape) for tensor in found] == [(16, 0), (0,), (0,), (0,)]
    found = kernels.descend(empty, grid[0], grid[0], empty, square, 16)
    assert [tuple(tensor.shape) for tensor in found] == [(16, 0), (16, 0), (0,)]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("target", torch.zeros(513, 7), r"target: got \(513, 7\), expected \[g, N\] with g from 1 to 512"),
        ("target", torch.zeros(16, 7).double(), r"target: got torch.float64 on cpu, expected torch.float32"),
        ("target", torch.zeros(7, 16).T, r"target: got strides \(1, 16\), expected 1 along the last"),
        ("target", torch.empty(16, 2**27, device="meta")[:, :7], r"expected its elements to lie within 2\^31"),
        ("feedback", torch.zeros(16, 17), r"feedback: got \(16, 17\), expected \(16, 16\)"),
        ("costs", torch.zeros(16, 1), r"costs: got \(16, 1\), expected \(16,\)"),
        ("scales", torch.zeros(0, 7), r"scales: got \(0, 7\), expected \[C, 7\] with C >= 1"),
        ("zeros", torch.zeros(2, 7), r"zeros: got \(2, 7\), expected \(3, 7\)"),
        ("levels", 257, r"levels: got 257, expected 2 to 256"),
    ],
)
def test_wrong_arguments(name, wrong, message):
    arguments = {
        "target": torch.zeros(16, 7),
        "feedback": torch.zeros(16, 16),
        "costs": torch.zeros(16),
        "scales": torch.ones(3, 7),
        "zeros": torch.zeros(3, 7),
        "levels": 16,
    }
    with pytest.raises(ValueError, match=message):
        kernels.columns(**arguments | {name: wrong})


def test_wrong_arguments_of_descend():
    matrix, row, square = torch.zeros(16, 7), torch.ones(7), torch.eye(16)
    with pytest.raises(ValueError, match=r"descent: got \(16, 8\), expected \(16, 7\)"):
        kernels.descend(matrix, row, row, torch.zeros(16, 8), square, 16)
    with pytest.raises(ValueError, match=r"inner: got \(8, 8\), expected \(16, 16\)"):
        kernels.descend(matrix, row, row, matrix, torch.eye(8), 16)
    with pytest.raises(ValueError, match=r"scales: got \(8,\), expected \(7,\)"):
        kernels.descend(matrix, torch.ones(8), row, matrix, square, 16)


def test_the_quantizer_with_its_loops_in_the_kernels(device, monkeypatch):
    weight, hessian = torch.randn(33, 32, device=device), hessian_of(32).to(device)
    options = checked_options("gptq", {"sweeps": 1, "drift": 0})
    expected, notes = gptq.quantize(weight, {"hessian": hessian}, Scheme(4, 16, False), options)

    monkeypatch.setattr(gptq_kernels, "trusted_kernels", lambda device: kernels)
    actual, found = gptq.quantize(weight, {"hessian": hessian}, Scheme(4, 16, False), options)
    # ties: a row in which one goes the other way may end elsewhere
    assert (actual.codes == expected.codes).all(1).float().mean() > 0.9
    for stage, cost in notes["objective"].items():
        torch.testing.assert_close(found["objective"][stage].sum(), cost.sum(), rtol=1e-3, atol=0)
