"""Scales against a slow float64 reference, and what they gain where there are outliers."""

import pytest
import torch

from lowbit.calibration.smooth import Activations, Consumer, choose_scales, scales_of
from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.numerics.scheme import Scheme

STEP = 1 / 8  # of exponents


def test_scales_are_powers_of_the_eighth_root_of_two():
    exponents = torch.arange(-127, 128)
    assert torch.allclose(scales_of(exponents).double(), 2 ** (exponents.double() / 8), rtol=2**-24, atol=0)
    whole = exponents[exponents % 8 == 0]
    assert torch.equal(scales_of(whole), 2.0 ** (whole // 8))


def rounding(name):
    return lambda weight: dequantize(quantize_nearest(weight, Scheme.parse(name)), torch.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens=400, features=64, size=60.0):
    """Three channels that are much larger than the others."""
    x = random(tokens, features, seed=1)
    x[:, [3, 17, 40]] *= size
    return x


def observed(x, batches=7):
    activations = Activations(x.shape[1])
    for part in x.chunk(batches):
        activations.add(part, len(x))
    return activations


def output_error(consumers, x, scales, bits=None):
    """Slow, in float64, apart from `lowbit.calibration.smooth`."""
    lost = norm = 0.0
    for consumer in consumers:
        made = consumer.rounded((consumer.weight.double() * scales.double()).float()).double()
        for token in x.double():
            inputs = token / scales.double()
            if bits is not None:
                step = inputs.abs().max() / (2 ** (bits - 1) - 1)
                inputs = (inputs / step).round() * step
            wanted = consumer.weight.double() @ token
            lost += float((made @ inputs - wanted).square().sum())
            norm += float(wanted.square().sum())
    return (lost / norm) ** 0.5


@pytest.mark.parametrize("alpha", (0.0, 0.3, 0.5, 0.8, 1.0))
def test_smoothquant_formula(alpha):
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), to half a step, up to a common factor."""
    x, weights = with_outliers(), [random(48, 64), 3 * random(20, 64, seed=2)]
    consumers = [Consumer(weight, rounding("W8A16-CHANNEL")) for weight in weights]
    choice = choose_scales(consumers, observed(x), torch.arange(64), 64, alpha)
    largest = torch.cat(weights).double().abs().amax(0)
    wanted = (x.double().abs().amax(0) ** alpha / largest ** (1 - alpha)).log2()
    assert choice.alpha == alpha
    assert ((scales_of(choice.exponents).double().log2() - (wanted - wanted.mean())).abs() <= STEP / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", (None, 8))
def test_errors_are_those_of_the_reference(bits):
    x = with_outliers(tokens=100)
    consumers = [
        Consumer(random(48, 64), rounding("W4A16-G16")),
        Consumer(random(9, 64, seed=2), rounding("W4A16-G16")),
    ]
    choice = choose_scales(consumers, observed(x), torch.arange(64), 64, 0.5, activation_bits=bits)
    expected = [output_error(consumers, x, scales, bits) for scales in (torch.ones(64), scales_of(choice.exponents))]
    assert choice.errors == pytest.approx(expected, rel=1e-4)


GAINS = (("W4A16-CHANNEL", None, 0.8), ("W4A16-G16", None, 0.8), ("W8A16-CHANNEL", 8, 0.5))


@pytest.mark.parametrize("scheme, bits, gain", GAINS)
def test_outliers_are_taken_care_of(scheme, bits, gain):
    """On tokens that were not looked at; `gain` is the share of the error that may be left."""
    x, consumers = with_outliers(), [Consumer(random(48, 64), rounding(scheme))]
    choice = choose_scales(consumers, observed(x[:300]), torch.arange(64), 64, "auto", activation_bits=bits)
    before, after = (
        output_error(consumers, x[300:], scales, bits) for scales in (torch.ones(64), scales_of(choice.exponents))
    )
    assert choice.alpha is not None and after < gain * before


def test_scales_that_gain_nothing_are_not_chosen():
    exact = Consumer(random(48, 64), lambda weight: weight)
    choice = choose_scales([exact], observed(with_outliers()), torch.arange(64), 64, "auto")
    assert choice.alpha is None and not choice.exponents.any()


def test_channels_that_share_a_scale():
    """Inputs k and k + 32 come from the same output."""
    x, channels = with_outliers(), torch.arange(32).repeat(2)
    consumers = [Consumer(random(48, 64), rounding("W4A16-CHANNEL"))]
    choice = choose_scales(consumers, observed(x), channels, 32, 0.5)
    largest = x.abs().amax(0).view(2, 32).amax(0)
    by_weight = consumers[0].weight.abs().amax(0).view(2, 32).amax(0)
    wanted = (largest.sqrt() / by_weight.sqrt()).log2()
    assert ((scales_of(choice.exponents).log2() - (wanted - wanted.mean())).abs() <= STEP / 2 + 1e-6).all()
    assert choice.errors[1] == pytest.approx(
        output_error(consumers, observed(x).sample, scales_of(choice.exponents)[channels]), rel=1e-4
    )


def test_channels_that_are_always_zero():
    x = with_outliers()
    x[:, 5] = 0
    weight = random(48, 64)
    weight[:, 9] = 0
    choice = choose_scales([Consumer(weight, rounding("W4A16-G16"))], observed(x), torch.arange(64), 64, 0.5)
    assert choice.exponents[5] == choice.exponents[9] == 0 and scales_of(choice.exponents).isfinite().all()


def test_activations_of_several_processes():
    x = with_outliers(tokens=2000)
    whole, first, second = observed(x, 1), Activations(64), Activations(64)
    first.add(x[:1500], 1500)
    second.add(x[1500:], 500)
    merged = Activations.merged([first, second])
    assert merged.tokens == 2000 and torch.equal(merged.largest, x.abs().amax(0))
    assert torch.allclose(merged.mean, x.double().abs().mean(0).float())
    assert torch.allclose(whole.mean, merged.mean)
    rows = {tuple(row) for row in x.tolist()}
    assert 256 <= len(merged.sample) <= 512 and all(tuple(row) in rows for row in merged.sample.tolist())
