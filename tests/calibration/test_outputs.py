"""Outputs of linears on their way into the residual stream, against the stream that they make, in float64."""

import pytest
import torch
from torch import nn

from lowbit.calibration.moments import Moments
from lowbit.calibration.outputs import Output, gains_of, token_factors
from lowbit.calibration.staged_pass import find_stages

WIDTH = 12


class Scaling(nn.Module):
    """An RMS norm; offset: that of what it multiplies by, as in Gemma."""

    def __init__(self, offset=0.0, eps=1e-6):
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(torch.randn(WIDTH)), offset, eps

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (self.weight + self.offset)).to(x.dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_of_a_norm(offset, dtype):
    norm, x = Scaling(offset), torch.randn(20, WIDTH).to(dtype)
    gains = gains_of(norm, x)
    assert gains.dtype == torch.float32
    torch.testing.assert_close(gains, (norm.weight + offset).detach(), rtol=1e-2, atol=1e-3)
    factors = token_factors(x, norm(x).detach(), gains)
    torch.testing.assert_close(factors, x.float().square().mean(1).rsqrt(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "other",
    [nn.LayerNorm(WIDTH), nn.Tanh(), nn.Softmax(-1), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), lambda x: None],
    ids=["mean subtracted", "tanh", "softmax", "linear", "narrower", "nothing"],
)
def test_what_is_no_scaling_of_tokens_and_channels_is_not_seen_through(other):
    assert gains_of(other, torch.randn(20, WIDTH)) is None


class PostNorm(nn.Module):
    """Both outputs join the stream, the first one through a norm; the norm in front of a linear takes none."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = Scaling(), Scaling(1.0)
        self.inner, self.out, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        x = x + self.behind(self.out(torch.tanh(self.inner(self.before(x)))))
        return x + self.last(x)


def test_a_norm_between_a_linear_and_the_stream_is_found():
    block, x = PostNorm(), torch.randn(2, 5, WIDTH)
    parameters = {name: p for name, p in block.named_parameters() if p.ndim == 2}
    modules = {"before": block.before, "behind": block.behind}
    stages = find_stages(lambda: block(x), parameters, x, modules)
    found = {stage.parameters[0]: (stage.joins, stage.through) for stage in stages}
    assert found == {
        "inner.weight": (False, None), "out.weight": (True, "behind"), "last.weight": (True, None),
    }  # fmt: skip
    without = find_stages(lambda: block(x), parameters, x)
    assert not next(stage for stage in without if stage.parameters == ("out.weight",)).joins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_missing_through_a_norm(dtype):
    """Of a stream that lacks exactly what a change d of the weight adds behind the norm, to first order, d is found:
    tokens of all sizes count as much as the norm leaves of them."""
    norm, tokens = Scaling(1.0), 4000
    with torch.no_grad():
        norm.weight.mul_(0.2)
    weight, wanted = torch.randn(WIDTH, 3 * WIDTH).to(dtype), torch.randn(WIDTH, 3 * WIDTH)
    x = (torch.randn(tokens, 3 * WIDTH) * torch.rand(tokens, 1).add(0.05)).to(dtype)
    output = (x @ weight.T).float()
    gains = (1 + norm.weight.detach()) * output.square().mean(1, keepdim=True).rsqrt()
    moments = Moments(3 * WIDTH, output=Output(weight, norm, gains_of(norm, torch.randn(16, WIDTH))))
    moments.add(x, x, (gains * (x.float() @ wanted.T)).to(dtype))
    moments.finish()
    found = torch.linalg.solve(moments.hessian.double(), moments.missing(weight).double().T).T
    # small gains are not divided by as they are: a hundredth less
    torch.testing.assert_close(found, wanted.double(), rtol=0.04, atol=0.02)
