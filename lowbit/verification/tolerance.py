"""How far a quantized weight may be from the one it was made of.

No number for each count of bits says it: what rounding loses depends on the group and on the weights, from half a
percent at 8 bits to 90 % at 2 bits where there are outliers. So the same weight is rounded in the same scheme: methods
that trade a larger weight error for a smaller output error stay within a factor of two of that, damage is beyond it
(docs/verify.md has what was measured). Where rounding loses almost all, damage loses little more; there it is told
by its direction.

A method may also move a weight before it rounds it, to make up for what the weights before it have lost. By how much,
the method knows (`moved` in the report of a run) and the scheme does not: 8 bits behind 2 are moved as far as 2 bits
round. What is moved by m and then rounded to within r is off by sqrt(m^2 + r^2), the two being independent, where r is
that of a weight which is sqrt(1 + m^2) times as large. Where nobody says m, it may be what the coarsest scheme of the
folder rounds by.
"""

import math
from collections.abc import Iterable

import torch

from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# Times the error of rounding. A zero point that is off by one adds a whole step to the 1 / sqrt(12) of a step that
# rounding loses: a factor of sqrt(13) = 3.6
_FACTOR = 2.5
# Cosine between a weight and its quantized form; that of another weight is 0
_LEAST_COSINE = 0.2
# Where weights are on their grid already, rounding loses nothing, and 16-bit scales so much
_LEAST_LIMIT = 0.004


def difference(
    qweight: QuantWeight, source: torch.Tensor, moved: float | None = 0.0, others: Iterable[Scheme] = ()
) -> str | None:
    """What is too different in a quantized weight.

    Args:
        qweight: The quantized weight.
        source: Floating [N, K], what it was made from.
        moved: By how much it was moved before it was rounded, relative to the norm of the source; None if nobody knows.
        others: Where nobody knows, the schemes of the weights that it may make up for.

    Returns:
        What is wrong, None if it is near enough.
    """
    rounding = _rounding_error(source, qweight.scheme)
    if moved is None:
        coarser = (_rounding_error(source, scheme.fitted(source.shape[1])) for scheme in others)
        moved = max((error for error in coarser if error > rounding * 1.01), default=0.0)
    limit = max(math.hypot(moved, _FACTOR * rounding * math.hypot(1, moved)), _LEAST_LIMIT)
    made, source = dequantize(qweight, torch.float32), source.float()
    size = source.norm().clamp_min(1e-30)
    error = float((made - source).norm() / size)
    if not error <= limit:
        reason = f"{_FACTOR} times that of rounding"
        if moved:
            reason += f", and {moved:.3f} for what it makes up for"
        return f"a relative error of {error:.3f}, expected at most {limit:.3f}: {reason}"
    cosine = float((made * source).sum() / (made.norm().clamp_min(1e-30) * size))
    least = _LEAST_COSINE / math.hypot(1, moved)
    if error and cosine < least:
        return f"a cosine of {cosine:.2f}, expected at least {least:.2f}"
    return None


def _rounding_error(source: torch.Tensor, scheme: Scheme) -> float:
    """Relative error of `source`, rounded to nearest."""
    rounded = dequantize(quantize_nearest(source.contiguous(), scheme.weight_only), torch.float32)
    source = source.float()
    return float((rounded - source).norm() / source.norm().clamp_min(1e-30))
