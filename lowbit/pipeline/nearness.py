"""How far a quantized weight may be from the one it was made of.

No number for each count of bits says it: what rounding loses depends on the group and on the weights, from half a
percent at 8 bits to 90 % at 2 bits where there are outliers. So the same weight is rounded in the same scheme: methods
that trade a larger weight error for a smaller output error stay within a factor of two of that, damage is beyond it
(docs/verify.md has what was measured). Where rounding loses almost all, damage loses little more; there it is told
by its direction.
"""

import torch

from lowbit.grid import dequantize, quantize_nearest
from lowbit.qweight import QuantWeight

# Times the error of rounding. A zero point that is off by one adds a whole step to the 1 / sqrt(12) of a step that
# rounding loses: a factor of sqrt(13) = 3.6
_FACTOR = 2.5
# Cosine between a weight and its quantized form; that of another weight is 0
_LEAST_COSINE = 0.2
# Where weights are on their grid already, rounding loses nothing, and 16-bit scales so much
_LEAST_LIMIT = 0.004


def difference(qweight: QuantWeight, source: torch.Tensor) -> str | None:
    """What is too different in a weight quantized from `source`, floating [N, K]; None if it is near enough."""
    made = dequantize(qweight, torch.float32)
    rounded = dequantize(quantize_nearest(source.contiguous(), qweight.scheme.weight_only), torch.float32)
    source = source.float()
    size = source.norm().clamp_min(1e-30)
    error, limit = float((made - source).norm() / size), float((rounded - source).norm() / size) * _FACTOR
    limit = max(limit, _LEAST_LIMIT)
    if not error <= limit:
        return f"a relative error of {error:.3f}, expected at most {limit:.3f}: {_FACTOR} times that of rounding"
    cosine = float((made * source).sum() / (made.norm().clamp_min(1e-30) * size))
    if error and cosine < _LEAST_COSINE:
        return f"a cosine of {cosine:.2f}, expected at least {_LEAST_COSINE}"
    return None
