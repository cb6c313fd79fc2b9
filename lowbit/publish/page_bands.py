"""Good, fair or bad: what a relative error of the linears means for the text that a model writes.

The limits are on perplexity: in a good model it grows by 1 % at most, in a fair one by 5 %. Stated as KL divergence
that is 0.01 and 0.05 nats (61 models in scripts/benchmarks/results/quality_peers.json: 0.83 % for each 0.01 nats, in
the median), which grows with the square of small errors. How fast was measured with scripts/benchmarks/error_bands.py:
the embedded model, from 2 to 8 bits, with data and without. A weight is called what the model would be if all of its
weights were as wrong as that one.
"""

# KL divergence in nats
GOOD_KL, FAIR_KL = 0.01, 0.05
# Key of the error in a report -> KL divergence over the square of that error (results/error_bands.json, geometric mean)
KL_OVER_SQUARE = {"output_error": 5.9, "error": 1.2}


def limits(measure: str) -> tuple[float, float]:
    """The largest relative errors that are good, and fair."""
    return tuple((kl / KL_OVER_SQUARE[measure]) ** 0.5 for kl in (GOOD_KL, FAIR_KL))


def band(value: float, good: float, fair: float) -> str:
    return "good" if value <= good else "fair" if value <= fair else "bad"
