"""The grid of activations against slow definitions in float64."""

import math

import pytest
import torch

from lowbit.numerics.activations import RangeObserver, affine, dequantize, quantize, quantize_input
from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.reference import linear
from lowbit.numerics.scheme import ACTIVATION_RANGES, BITS, Activations, Scheme

STATIC = {sym: Activations(8, sym, "tensor") for sym in (True, False)}
DYNAMIC = {sym: Activations(8, sym, "token") for sym in (True, False)}
both = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])


def slow_grid(low, high, sym):
    """(scale, zero) in Python's float64, which rounds halves to even too."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / 127.5 if sym else (high - low) / 255
    scale = max(scale, torch.finfo(torch.float32).tiny)
    return scale, 0 if sym else min(max(round(-128 - low / scale), -128), 127)


def slow_code(x, scale, zero):
    steps = float(torch.tensor(x).float() / torch.tensor(scale).float())  # divided in float32, where ties are ties
    return min(max(round(steps) + zero, -128), 127)


def skewed(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1.7


@both
@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (-5, 3), (0, 9), (2, 9), (-9, -2), (0, 0), (-1e-44, 0), (-1e30, 1)])
def test_affine(sym, low, high):
    scale, zero = affine(torch.tensor([low]).float(), torch.tensor([high]).float(), DYNAMIC[sym])
    wanted_scale, wanted_zero = slow_grid(low, high, sym)
    assert math.isclose(float(scale), wanted_scale, rel_tol=1e-6)
    assert (zero is None) == sym and (sym or int(zero) == wanted_zero)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_of_tokens(sym, dtype):
    x = skewed(7, 33).to(dtype)
    x[2] = 0
    x[3, 5] = 4000  # an outlier takes the codes of its own token only
    codes, scale, zero = quantize_input(x, DYNAMIC[sym])
    for row, values in enumerate(x.double().tolist()):
        wanted_scale, wanted_zero = slow_grid(min(values), max(values), sym)
        assert math.isclose(float(scale[row]), wanted_scale, rel_tol=1e-6)
        assert sym or int(zero[row]) == wanted_zero
        assert codes[row].tolist() == [slow_code(value, float(scale[row]), wanted_zero) for value in values]
    assert (dequantize(codes, scale, zero)[2] == 0).all()


@both
def test_values_come_back_to_half_a_step(sym):
    x = skewed(64, 48)
    codes, scale, zero = quantize_input(x, DYNAMIC[sym])
    error = (dequantize(codes, scale, zero) - x).abs() / scale
    assert error.max() <= 0.5001 + (0 if sym else 0.5)  # the zero point is rounded, and its grid shifts with it


def test_halves_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0])
    assert quantize(x, torch.tensor(1.0), None, DYNAMIC[True]).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128]


@both
def test_a_stored_scale_is_rounded_before_the_zero_point_is_chosen(sym):
    low, high = torch.tensor([-1.2345]), torch.tensor([4.3211])
    scale, zero = affine(low, high, STATIC[sym], torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    if not sym:
        assert int(zero) == round(-128 + 1.2345 / float(scale))


def slow_percentile(values, sym):
    """The range without the outermost values, from the sorted values themselves."""
    if sym:
        largest = values.abs().sort()[0][math.ceil(len(values) * (1 - 1e-4)) - 1]
        return -largest, largest
    values, cut = values.sort()[0], math.floor(len(values) * 5e-5)
    return values[cut], values[len(values) - 1 - cut]


def squared_error(values, low, high, sym):
    scale, zero = slow_grid(float(low), float(high), sym)
    codes = ((values / scale).round() + zero).clamp(-128, 127)
    return float(((codes - zero) * scale - values).square().mean())


def observed(values, parts=7, shuffled=False):
    observer = RangeObserver()
    chunks = list(values.chunk(parts))
    for chunk in reversed(chunks) if shuffled else chunks:
        observer.add(chunk)
    return observer


def heavy_tailed(count=40000):
    rng = torch.Generator().manual_seed(3)
    values = torch.randn(count, generator=rng) + 0.4
    values[::5000] *= 40
    return values


@both
def test_minmax(sym):
    values = heavy_tailed()
    scale, zero = observed(values).grid("minmax", STATIC[sym])
    wanted = slow_grid(float(values.min()), float(values.max()), sym)
    assert math.isclose(float(scale), wanted[0], rel_tol=1e-6) and (sym or int(zero) == wanted[1])


@both
def test_percentile_is_that_of_the_sorted_values_to_a_bin(sym):
    values = heavy_tailed()
    observer = observed(values)
    scale, _ = observer.grid("percentile", STATIC[sym])
    low, high = slow_percentile(values.double(), sym)
    wanted, _ = slow_grid(float(low), float(high), sym)
    bin_width = 2 * 256 / 2048  # the largest value is below 256
    assert abs(float(scale) - wanted) <= 2 * bin_width / (127.5 if sym else 255)
    assert float(scale) < 0.8 * float(observer.grid("minmax", STATIC[sym])[0])


@both
def test_mse_finds_the_least_error_of_all_shrunk_ranges(sym):
    values = heavy_tailed()
    scale, zero = observed(values).grid("mse", STATIC[sym])
    found = (dequantize(quantize(values, scale, zero, STATIC[sym]), scale, zero) - values).double().square().mean()
    low, high = float(values.min()), float(values.max())
    errors = [squared_error(values.double(), low * k / 100, high * k / 100, sym) for k in range(1, 101)]
    assert float(found) <= 1.02 * min(errors)
    assert float(found) < 0.98 * errors[-1] or min(errors) > 0.98 * errors[-1]


@both
@pytest.mark.parametrize("method", ACTIVATION_RANGES)
def test_the_order_and_the_size_of_batches_do_not_matter(sym, method):
    values = heavy_tailed()
    merged = observed(values[:11111])
    merged.merge(RangeObserver())
    merged.merge(observed(values[11111:], 3))
    into_none = RangeObserver()
    into_none.merge(merged)
    wanted = observed(values).grid(method, STATIC[sym])
    for other in (observed(values, 1), observed(values, 50, shuffled=True), merged, into_none):
        assert other.grid(method, STATIC[sym]) == wanted


def test_an_observer_counts_every_value_once():
    values = torch.tensor([0.0, -1.0, 1.0, 1e-40, 5.0, -7.999, 8.0])
    observer = observed(values, 7)
    edges = observer._edges()
    assert observer._counts.sum() == 7 and (observer.low, observer.high) == (values.min(), 8.0)
    for low, high, count in zip(edges[:-1], edges[1:], observer._counts, strict=True):
        assert count == ((values.double() >= low) & (values.double() < high)).sum()


@both
@pytest.mark.parametrize("method", ACTIVATION_RANGES)
def test_inputs_that_are_always_zero(sym, method):
    scale, zero = observed(torch.zeros(9), 1).grid(method, STATIC[sym])
    assert scale > 0 and (dequantize(quantize(torch.zeros(3), scale, zero, STATIC[sym]), scale, zero) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_observer_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="expected finite ones"):
        RangeObserver().add(torch.tensor([1.0, bad]))


def random_weight(out_features, in_features, scheme, seed=0):
    rng = torch.Generator().manual_seed(seed)
    groups = scheme.groups(in_features)
    codes = torch.randint(0, scheme.levels, (out_features, in_features), generator=rng).to(torch.uint8)
    zeros = torch.randint(0, scheme.levels, (out_features, groups), generator=rng).to(torch.uint8)
    grid = {"input_scale": torch.tensor([0.043]), "input_zero": torch.tensor([-37], dtype=torch.int8)}
    return QuantWeight(
        codes, torch.rand(out_features, groups, generator=rng) + 0.1, scheme, None if scheme.sym else zeros,
        **{name: grid[name] for name in input_grid(scheme)},
    )  # fmt: skip


def slow_linear(x, qweight, bias):
    """In int64, one group after the other."""
    activations = qweight.scheme.activations
    group = qweight.scheme.group_of(qweight.in_features)
    y = torch.zeros(len(x), qweight.out_features, dtype=torch.float64)
    for row, values in enumerate(x.double().tolist()):
        if activations.static:
            scale, zero = float(qweight.input_scale), 0 if activations.sym else int(qweight.input_zero)
        else:
            scale, zero = slow_grid(min(values), max(values), activations.sym)
            scale = float(torch.tensor(scale, dtype=torch.float32))
        steps = torch.tensor([slow_code(value, scale, zero) - zero for value in values])
        for start in range(0, qweight.in_features, group):
            part = slice(start, start + group)
            zeros = qweight.scheme.middle if qweight.zeros is None else qweight.zeros[:, start // group, None].long()
            total = ((qweight.codes[:, part].long() - zeros) * steps[part]).sum(1)
            assert total.abs().max() < 2**31
            y[row] += total * qweight.scales[:, start // group].double() * scale
    return y + bias.double()


@pytest.mark.parametrize("activations", [*STATIC.values(), *DYNAMIC.values()], ids=str)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_reference_is_integer_arithmetic(bits, sym, activations):
    for group, in_features in ((-1, 37), (16, 48), (32, 32)):
        qweight = random_weight(5, in_features, Scheme(bits, group, sym, activations))
        x, bias = skewed(4, in_features), torch.randn(5)
        x[1], x[2, 3] = 0, 500.0
        y, wanted = linear(x, qweight, bias), slow_linear(x, qweight, bias)
        assert (y - wanted).norm() / wanted.norm() < 1e-6
        assert torch.equal(y[1], bias)
        assert linear(x[:0], qweight, bias).shape == (0, 5)


@pytest.mark.parametrize("activations", [*STATIC.values(), *DYNAMIC.values()], ids=str)
def test_a_token_with_nan_gives_nan_and_disturbs_no_other(activations):
    qweight = random_weight(5, 16, Scheme(8, -1, True, activations))
    x = skewed(3, 16)
    clean = linear(x, qweight)
    x[1, 3] = math.nan
    y = linear(x, qweight)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_gradients_pass_the_rounding_by():
    qweight = random_weight(5, 32, Scheme(4, 16, False, DYNAMIC[True]))
    x = skewed(3, 32).requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    grad = torch.randn(3, 5)
    linear(x, qweight, bias).backward(grad)
    floating = QuantWeight(qweight.codes, qweight.scales, qweight.scheme.weight_only, qweight.zeros)
    plain = x.detach().clone().requires_grad_()
    linear(plain, floating).backward(grad)
    assert torch.allclose(x.grad, plain.grad) and torch.allclose(bias.grad, grad.sum(0))


@pytest.mark.parametrize(
    ("scheme", "grid", "message"),
    [
        ("W8A8-STATIC", {"input_scale": torch.ones(1)}, "needs input_zero"),
        ("W8A8-STATIC", {}, "needs input_scale"),
        ("W8A8-STATIC_SYM", {"input_scale": torch.ones(2)}, r"input_scale is torch.float32 \(2,\), expected"),
        ("W8A8", {"input_scale": torch.ones(1)}, "takes no input_scale"),
        ("W8A16-CHANNEL", {"input_zero": torch.ones(1, dtype=torch.int8)}, "takes no input_zero"),
    ],
)
def test_a_weight_holds_the_grid_of_static_inputs_only(scheme, grid, message):
    with pytest.raises(ValueError, match=message):
        QuantWeight(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), Scheme.parse(scheme), **grid)
