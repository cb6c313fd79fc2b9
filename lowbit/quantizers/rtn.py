"""Round to nearest: each weight goes to the closest point of its group's grid. No data, no solver, seconds."""

from collections.abc import Mapping

import torch

from lowbit.numerics.grid import quantize_nearest
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import SCALE_SEARCHES, Scheme

OPTIONS = {"scale_search": SCALE_SEARCHES}


def needs(options: Mapping) -> tuple[str, ...]:
    return ()


def quantize(weight: torch.Tensor, stats: dict, scheme: Scheme, options: Mapping) -> tuple[QuantWeight, dict]:
    """Round one weight to nearest.

    Args:
        weight: Floating [N, K].
        stats: Unused: no data.
        scheme: The grid; its group size divides K.
        options: All of `OPTIONS`.

    Returns:
        The weight, with scales in weight.dtype, and no notes.
    """
    return quantize_nearest(weight, scheme, options["scale_search"]), {}
