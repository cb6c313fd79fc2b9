"""How much of GPTQ's drift correction is made: the share that is best for tokens left out of the fit."""

import types

import pytest
import reference_gptq as reference
import torch
from reference_gptq import heavy_tailed, inputs

from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import checked_options, gptq


def lacking_of(tokens, linear, noise, features=96, rows=17):
    """(x [T, K], lacking [T, N]): a linear part of x, and noise, in these shares of the output's size."""
    x = inputs(tokens, features).float()
    rng = torch.Generator().manual_seed(5)
    direction = torch.randn(features, rows, generator=rng) / features**0.5
    made = x @ direction
    return x, linear * made + noise * made.std() * torch.randn(tokens, rows, generator=rng)


def corrected_share(x, lacking, judged, **options):
    weight = heavy_tailed(lacking.shape[1], x.shape[1])
    judge = types.SimpleNamespace(x=x[judged], lacking=lacking[judged], tokens=len(x))
    stats = {"hessian": x.T @ x / len(x), "missing": lacking.T @ x / len(x), "judge": judge}
    return gptq.quantize(weight, stats, Scheme(4, 32, False), checked_options("gptq", options))[1]["drift"]


@pytest.mark.parametrize(("linear", "noise"), [(1.0, 3.0), (0.1, 1.0), (0.02, 1.0)])
@pytest.mark.parametrize("order", ["none", "group"])
def test_share_is_what_a_fit_without_the_judged_tokens_would_choose(linear, noise, order):
    """Against a second fit, in float64, in which they are missing."""
    (x, lacking), judged = lacking_of(400, linear, noise), slice(None, None, 10)
    found = corrected_share(x, lacking, judged, order=order)
    x, lacking = x.double(), lacking.double()
    left, aimed = x[judged], lacking[judged]
    hessian = reference.damped(x.T @ x / len(x), checked_options("gptq", {})["damping"]) - left.T @ left / len(x)
    fitted = torch.linalg.solve(hessian, (x.T @ lacking - left.T @ aimed) / len(x))
    predicted = left @ fitted
    best = float((predicted * aimed).sum() / predicted.square().sum())
    assert 0.02 < best < 1 and found == pytest.approx(best, abs=1e-3)


def test_share_of_what_inputs_explain_and_of_noise():
    judged = slice(None, None, 8)
    assert corrected_share(*lacking_of(800, 1.0, 0.0), judged) > 0.95
    assert corrected_share(*lacking_of(800, 0.0, 1.0), judged) < 0.1
    assert corrected_share(*lacking_of(100, 0.3, 1.0), judged) < corrected_share(*lacking_of(3000, 0.3, 1.0), judged)
    assert corrected_share(*lacking_of(800, 0.0, 1.0), judged, drift=0.7) == 0.7


def test_without_a_judge_the_whole_correction_is_made():
    x, lacking = lacking_of(400, 1.0, 1.0)
    stats = {"hessian": x.T @ x / len(x), "missing": lacking.T @ x / len(x)}
    _, notes = gptq.quantize(heavy_tailed(17, 96), stats, Scheme(4, 32, False), checked_options("gptq", {}))
    assert notes["drift"] == 1
