"""What the output of a linear becomes on its way into the residual stream, and so what it ought to make up for.

In most models the output o is added to the stream as it is: what the stream lacks so far, r_f - r_x, is lacking in o.
In others a norm lies between, and n(o) is added. It is seen through by its derivative: an RMS norm multiplies token t
and channel i by c_t g_i (how c_t changes with o is left out), so that a change d of the weight adds c_t g_i (d x_t)_i.
The squared error of the stream,

    sum over t of (l_ti - c_t g_i (d x_t)_i)^2,       l = (r_f - r_x) + n(W f) - n(W x),

is that of a linear without a norm whose inputs are c_t x_t and whose output lacks l_ti / g_i.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Relative difference between what a norm gives and its input times c_t g_i, beyond which it is another kind of norm:
# what bfloat16 rounds is a tenth of it
_SCALES = 0.02
# Gains below this part of the root mean square are not divided by as they are: such channels matter little
_SMALLEST_GAIN = 0.1


@dataclass(frozen=True)
class Output:
    """weight: floating [N, K] of the linear. gains: float32 [N], g of the norm behind it; None: there is none. norm: it
    itself, floating [tokens, N] -> the same."""

    weight: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    gains: torch.Tensor | None = None

    @torch.no_grad()
    def of_inputs(
        self, x: torch.Tensor, f: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the linear's inputs count for, and what its output lacks.

        Args:
            x, f: Floating [tokens, K], of the quantized and of the original stream.
            residual: [tokens, N], r_f - r_x; None: not known, or the output does not join the stream.

        Returns:
            [tokens, K] and [tokens, N], of the dtype of x.
        """
        weight = self.weight.to(x.dtype).T
        if self.norm is None or self.gains is None:
            lacking = (f - x) @ weight
            return x, lacking if residual is None else lacking.add_(residual)
        output, wanted = x @ weight, f @ weight
        normed = self.norm(output)
        lacking = self.norm(wanted) - normed
        if residual is not None:
            lacking += residual
        size = self.gains.square().mean().sqrt()
        divided = lacking.float() * (self.gains / (self.gains.square() + (_SMALLEST_GAIN * size).square()))
        factors = token_factors(output, normed, self.gains).unsqueeze(1)
        return (x.float() * factors).to(x.dtype), divided.to(x.dtype)


@torch.no_grad()
def gains_of(norm: Callable[[torch.Tensor], torch.Tensor], examples: torch.Tensor) -> torch.Tensor | None:
    """g, float32 [N], of a module that multiplies token t and channel i by c_t g_i; None for one that does otherwise.

    examples: floating [tokens, N], inputs that it may get.
    """
    try:
        gains = norm(torch.ones_like(examples[:1]))[0].float()
        normed = norm(examples).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    if gains.shape != examples.shape[1:] or not gains.abs().max() > 0:
        return None
    expected = token_factors(examples, normed, gains).unsqueeze(1) * examples.float() * gains
    same = torch.linalg.vector_norm(normed - expected) <= _SCALES * torch.linalg.vector_norm(expected)
    return gains if same else None


def token_factors(x: torch.Tensor, normed: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """c, float32 [tokens], for which `normed` is nearest to c_t g_i x_ti."""
    scaled = x.float() * gains
    return (normed.float() * scaled).sum(1) / scaled.square().sum(1).clamp_min(1e-30)
