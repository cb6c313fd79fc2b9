"""Round to nearest against a slow float64 version, group by group, in Python numbers."""

import math

import pytest
import torch
from covering import covering
from weights import BITS, DTYPES, matrix, unit

from lowbit.numerics import grid
from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# lowbit works in float32. In a scale are at most two roundings (a difference, a quotient), 2^-24 each; a code rounds a
# quotient below 256, whose error in float32 is at most 256 * 2^-25 < 1e-5: only codes nearer to a tie may differ
SCALE_SLACK = 2.0**-23
TIE = 1e-5

GROUPS = (16, 32, 64, 128, 256, -1)
IN_FEATURES = {16: 96, 32: 96, 64: 128, 128: 256, 256: 512, -1: 172}
SYM = {"sym": True, "asym": False}


def heavy_tailed(rows, columns, dtype, seed=0):
    """Student-t with three degrees of freedom, each column correlated with the one before, rows of many sizes."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, rows, columns, dtype=torch.float64, generator=rng)
    weight = normal[0] / normal[1:].square().mean(0).sqrt()
    for column in range(1, columns):
        weight[:, column] += 0.7 * weight[:, column - 1]
    weight *= 0.05 * torch.logspace(0, 1.5, rows, dtype=torch.float64).unsqueeze(1)
    return weight.to(dtype)


def groups_of(weight, scheme):
    """[N][G] lists of Python numbers."""
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    return [[row[i : i + size] for i in range(0, len(row), size)] for row in weight.double().tolist()]


def slow_scale(values, scheme, shrink=1.0):
    """The exact scale of a group, before it is rounded to its dtype."""
    if scheme.sym:
        return shrink * max(abs(v) for v in values) / ((2**scheme.bits - 1) / 2)
    return shrink * (max(0.0, *values) - min(0.0, *values)) / (2**scheme.bits - 1)


def slow_code(value, zero, scheme):
    """value in steps of the scale -> (code, distance of value from the nearest tie)."""
    code = round(value) + zero  # round() goes to even, as torch does
    return min(max(code, 0), 2**scheme.bits - 1), abs(value - math.floor(value) - 0.5)


def slow_error(values, scale, low, scheme):
    """The squared error of rounding a group to the grid of `scale` (and the zero point of `low`)."""
    zero = 2 ** (scheme.bits - 1) if scheme.sym else slow_code(-low / scale, 0, scheme)[0]
    return sum(((slow_code(v / scale, zero, scheme)[0] - zero) * scale - v) ** 2 for v in values)


def rounded(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def scale_rounding(scale, dtype):
    """The largest relative error of a scale in `dtype`; fp16 has multiples of 2^-24 below 2^-14."""
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return torch.clamp(2.0**-25 / scale if dtype == torch.float16 else 0 * scale, min=unit(dtype))


def assert_nearest(weight, qweight):
    """Given its scales, each zero point and each code is the nearest one."""
    scheme, middle = qweight.scheme, 2 ** (qweight.scheme.bits - 1)
    columns = 0
    for n, row in enumerate(groups_of(weight, scheme)):
        codes = iter(qweight.codes[n].tolist())
        for g, values in enumerate(row):
            scale, zero = float(qweight.scales[n, g]), middle
            if not scheme.sym:
                zero = int(qweight.zeros[n, g])
                want, distance = slow_code(-min(0.0, *values) / scale, 0, scheme)
                assert zero == want or (distance < TIE and abs(zero - want) == 1), (n, g)
            for value in values:
                want, distance = slow_code(value / scale, zero, scheme)
                code = next(codes)
                assert code == want or (distance < TIE and abs(code - want) == 1), (n, g, value / scale)
                columns += 1
    assert columns == qweight.codes.numel()


def squared_error(qweight, weight):
    return (matrix(qweight) - weight.double()).square().sum()


@covering(strength=3, bits=BITS, group=GROUPS, sym=SYM, dtype=DTYPES, rows=(1, 7, 33))
def test_minmax_equals_the_slow_version(bits, group, sym, dtype, rows):
    scheme, weight = Scheme(bits, group, sym), heavy_tailed(rows, IN_FEATURES[group], dtype)
    before = weight.clone()
    qweight = quantize_nearest(weight, scheme)
    assert torch.equal(weight, before)
    assert qweight.scales.dtype == weight.dtype and qweight.codes.is_contiguous()
    for n, row in enumerate(groups_of(weight, scheme)):
        for g, values in enumerate(row):
            exact, scale = slow_scale(values, scheme), qweight.scales[n, g]
            # exact for symmetric schemes: one division of exact numbers
            slack = 0.0 if scheme.sym else SCALE_SLACK
            assert rounded(exact * (1 - slack), weight.dtype) <= scale <= rounded(exact * (1 + slack), weight.dtype)
    assert_nearest(weight, qweight)
    # half a step from the grid; at its ends also the rounding of the scale, code by code; and an asymmetric grid is
    # shifted by the rounding of its zero point, half a step
    steps = (matrix(qweight) - weight.double()).abs() / qweight.scales.double().repeat_interleave(
        weight.shape[1] // qweight.scales.shape[1], dim=1
    )
    ends = 2**scheme.bits * unit(weight.dtype)
    assert steps.max() <= (0.5 if scheme.sym else 1.0) + ends + TIE
    assert steps.median() < 0.5


@covering(strength=3, bits=BITS, group=(32, -1), sym=SYM, dtype=DTYPES)
def test_mse_search_equals_the_slow_version(bits, group, sym, dtype):
    scheme, weight = Scheme(bits, group, sym), heavy_tailed(3, IN_FEATURES[group], dtype)
    before = weight.clone()
    qweight = quantize_nearest(weight, scheme, "mse")
    assert torch.equal(weight, before)
    shrinks = [1 - 0.6 * step / 48 for step in range(49)]
    for n, row in enumerate(groups_of(weight, scheme)):
        for g, values in enumerate(row):
            errors = []
            for shrink in shrinks:
                scale = float(rounded(slow_scale(values, scheme, shrink), weight.dtype))
                errors.append(slow_error(values, scale, shrink * min(0.0, *values), scheme))
            part = QuantWeight(
                qweight.codes[n : n + 1, g * len(values) : (g + 1) * len(values)],
                qweight.scales[n : n + 1, g : g + 1],
                Scheme(scheme.bits, -1, scheme.sym),
                None if scheme.sym else qweight.zeros[n : n + 1, g : g + 1],
            )
            error = squared_error(part, torch.tensor([values], dtype=torch.float64))
            # errors are summed in float32: 172 squares of numbers that are themselves differences; far below 1e-4
            assert error <= min(errors) * (1 + 1e-4)


@covering(bits=BITS, group=GROUPS, sym=SYM, dtype=DTYPES)
def test_mse_search_is_never_worse_than_minmax(bits, group, sym, dtype):
    scheme, weight = Scheme(bits, group, sym), heavy_tailed(33, IN_FEATURES[group], dtype, seed=1)
    searched, minmax = quantize_nearest(weight, scheme, "mse"), quantize_nearest(weight, scheme)
    grouped = (weight.shape[0], minmax.scales.shape[1], -1)
    errors = [(matrix(q) - weight.double()).view(grouped).square().sum(-1) for q in (searched, minmax)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()  # of each group; compared in float32 by lowbit
    # with few codes and long tails clipping pays (at 8 bits the first step, 1/80 of the range, already costs too much;
    # at 5 and 6 it pays in few groups)
    if scheme.bits < 8:
        assert errors[0].sum() < {2: 0.85, 3: 0.9, 4: 0.97}.get(scheme.bits, 1.0) * errors[1].sum()


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_result_does_not_depend_on_the_slices(sym, search, monkeypatch):
    weight = heavy_tailed(33, 96, torch.bfloat16)
    whole = quantize_nearest(weight, Scheme(4, 32, sym), search)
    for elements in (1, 96, 7 * 96, 33 * 96 - 1):
        monkeypatch.setattr(grid, "_SLICE_ELEMENTS", elements)
        part = quantize_nearest(weight, Scheme(4, 32, sym), search)
        assert torch.equal(part.codes, whole.codes) and torch.equal(part.scales, whole.scales)
        assert sym or torch.equal(part.zeros, whole.zeros)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_strided_weights(sym):
    weight = heavy_tailed(33, 96, torch.float32)
    expected = quantize_nearest(weight, Scheme(4, 32, sym))
    wide = torch.full((33, 192), torch.nan)
    wide[:, ::2] = weight
    for strided in (weight.T.contiguous().T, wide[:, ::2]):
        assert not strided.is_contiguous()
        before = strided.clone()
        actual = quantize_nearest(strided, Scheme(4, 32, sym))
        assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scales, expected.scales)
        assert torch.equal(strided, before)
        assert torch.equal(dequantize(actual), dequantize(expected))


def test_group_must_divide_the_row():
    with pytest.raises(ValueError, match="in_features 96 is not a multiple of group_size 64"):
        quantize_nearest(torch.ones(2, 96), Scheme(4, 64))


each_grid = covering(bits=BITS, sym=SYM, dtype=DTYPES)


@each_grid
def test_zero_groups(bits, sym, dtype):
    """Also beside a group that is not zero."""
    scheme = Scheme(bits, 32, sym)
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[1, :32] = heavy_tailed(1, 32, dtype)
    for search in ("minmax", "mse"):
        qweight = quantize_nearest(weight, scheme, search)
        assert (qweight.scales[:, 1] == 1).all() and (qweight.scales[::2] == 1).all()
        assert (matrix(qweight)[:, 32:] == 0).all() and (matrix(qweight)[::2] == 0).all()
        assert matrix(qweight)[1, :32].abs().sum() > 0


@each_grid
def test_one_sided_groups(bits, sym, dtype):
    """Far from zero: the grid must still hold zero, and an asymmetric one spends all its codes on the side in use."""
    scheme = Scheme(bits, 32, sym)
    for sign in (1, -1):
        weight = sign * (1 + heavy_tailed(3, 64, dtype).abs())
        qweight = quantize_nearest(weight, scheme)
        assert_nearest(weight, qweight)
        if scheme.sym:
            side = qweight.codes >= scheme.middle if sign > 0 else qweight.codes <= scheme.middle
            assert side.all()
        else:
            # the zero point is at one end and the farthest weight at the other, up to the rounding of the scale
            last = scheme.levels - 1
            spanned = math.floor(last * (1 - unit(dtype)))
            zeros = qweight.zeros.int()
            assert (zeros == 0).all() if sign > 0 else (zeros >= spanned).all()
            used = (qweight.codes.int().view(3, 2, -1) - zeros.unsqueeze(-1)).abs().amax(-1)
            assert (used >= spanned).all() and (used <= last).all()


@each_grid
def test_constant_groups(bits, sym, dtype):
    scheme = Scheme(bits, 32, sym)
    for value in (0.37, -2.5, 1e-3):
        weight = torch.full((2, 64), value, dtype=dtype)
        qweight = quantize_nearest(weight, scheme)
        error = (matrix(qweight) - weight.double()).abs() / weight.double().abs()
        # asymmetric: the last code, off by the rounding of the scale. Symmetric: midway between the last two codes,
        # half a step of the (2^bits - 1) / 2 that the value spans
        expected = 1 / (2**scheme.bits - 1) if scheme.sym else 0.0
        assert (error - expected).abs().max() <= 2 * scale_rounding(slow_scale([value], scheme), dtype)


@each_grid
def test_huge_values(bits, sym, dtype):
    """Near the end of the dtype, but not where the end of a 2-bit grid (4/3 of the largest weight) overflows."""
    scheme = Scheme(bits, 32, sym)
    weight = heavy_tailed(3, 64, torch.float32)
    weight = (weight / weight.abs().max() * (0.49 * torch.finfo(dtype).max)).to(dtype)
    for search in ("minmax", "mse"):
        qweight = quantize_nearest(weight, scheme, search)
        assert qweight.scales.isfinite().all() and dequantize(qweight).isfinite().all()
    assert_nearest(weight, quantize_nearest(weight, scheme))


@each_grid
def test_small_values_lose_no_more_than_the_dtype_does(bits, sym, dtype):
    """fp16 scales leave the normal range early (8 bits: where |w| < 0.008), but go on for another ten bits."""
    scheme = Scheme(bits, 32, sym)
    for exponent in (-6, -10, -14):
        weight = heavy_tailed(7, 64, torch.float64, seed=2)
        weight = (weight / weight.abs().amax(1, keepdim=True) * 2.0**exponent).to(dtype)
        exact = quantize_nearest(weight.float(), scheme)  # float32 scales
        actual = quantize_nearest(weight, scheme)
        # a code c is off by c times the rounding of its scale
        worst = scheme.levels * scale_rounding(exact.scales.double(), dtype) * exact.scales.double()
        limit = squared_error(exact, weight).sqrt() + worst.repeat_interleave(32, dim=1).norm()
        assert squared_error(actual, weight).sqrt() <= limit


@each_grid
def test_scales_never_vanish(bits, sym, dtype):
    scheme = Scheme(bits, 32, sym)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.tensor([[smallest, -smallest] * 16, [0.0, smallest] * 16], dtype=dtype)
    assert (weight != 0).any(1).all()
    for search in ("minmax", "mse"):
        qweight = quantize_nearest(weight, scheme, search)
        assert (qweight.scales > 0).all() and dequantize(qweight).isfinite().all()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 16, False), Scheme(8, -1)], ids=lambda s: s.name)
def test_dequantize(scheme):
    qweight = quantize_nearest(heavy_tailed(7, 96, torch.bfloat16), scheme)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3)) % qweight.scales.shape[1]
    scattered = QuantWeight(qweight.codes, qweight.scales, scheme, qweight.zeros, order.int())
    for q in (qweight, scattered):
        before = q.codes.clone()
        # bf16 scales times small integers are exact in float32
        assert torch.equal(dequantize(q, torch.float32).double(), matrix(q))
        assert dequantize(q).dtype == torch.bfloat16 and torch.equal(dequantize(q), matrix(q).float().bfloat16())
        assert torch.equal(q.codes, before)
