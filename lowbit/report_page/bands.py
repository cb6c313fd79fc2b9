"""Good, fair or bad: what a relative error of the linears means for the text that a model writes.

The limits are on perplexity: in a good model it grows by 1 % at most, in a fair one by 5 %. Stated as KL divergence
that is 0.01 and 0.05 nats (61 models in scripts/benchmarks/results/quality_peers.json: 0.83 % for each 0.01 nats, in
the median). The errors of linears add up: the divergence is nearly proportional to the sum, over all of them, of their
squared errors, whatever the bits. scripts/benchmarks/error_bands.py measured by how much, of the embedded model,
SmolLM2 135M and Gemma 3 270M, which have 35, 210 and 126 linears: what rounding changes in outputs tells much, the
error of weights little. A weight is called what the model would be if all of its weights were as wrong as that one.
"""

from dataclasses import dataclass

# KL divergence in nats
GOOD_KL, FAIR_KL = 0.01, 0.05


@dataclass(frozen=True)
class Slope:
    """KL divergence over the sum of squared errors: of the model that forgives most, in the geometric mean of the
    models, and of the one that forgives least (results/error_bands.json)."""

    least: float
    usual: float
    most: float


# By the key of the error in a report
SLOPES = {
    "rounding_error": Slope(0.16, 0.2, 0.28),
    "error": Slope(0.034, 0.12, 0.3),
}


def limits(measure: str, modules: int) -> tuple[float, float]:
    """The largest relative errors that are good, and fair, in a model of so many quantized modules."""
    return tuple((kl / SLOPES[measure].usual / max(modules, 1)) ** 0.5 for kl in (GOOD_KL, FAIR_KL))


def band(value: float, good: float, fair: float) -> str:
    return "good" if value <= good else "fair" if value <= fair else "bad"
