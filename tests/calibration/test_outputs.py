"""Outputs of linears on their way into the residual stream, against the stream that they make, in float64."""

import pytest
import torch
from torch import nn

from lowbit.calibration.outputs import gains_of, token_factors

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
