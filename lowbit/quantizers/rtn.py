"""Round to nearest: each weight goes to the closest point of its group's grid. No data, no solver, seconds."""

from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.scheme import SCALE_SEARCHES

OPTIONS = {"scale_search": SCALE_SEARCHES}


def needs(options):
    return ()


def quantize(weight, stats, scheme, options):
    """weight: floating [N, K] -> QuantWeight with scales in weight.dtype. `stats` stays unused: no data."""
    return quantize_nearest(weight, scheme, options["scale_search"]), {}
