"""Weights moved to another grid without rounding: every number of the old one is one of the new one."""

import torch

from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme


def holds(scheme: Scheme, source: Scheme, in_features: int) -> bool:
    """Whether a weight of `source`, its groups of consecutive inputs, is one of `scheme` too: its groups are parts of
    theirs, and its codes reach as far as theirs do from their zero points."""
    if source.group_of(in_features) % scheme.group_of(in_features):
        return False
    return scheme.bits > source.bits or (scheme.bits == source.bits and (source.sym or not scheme.sym))


def converted(weight: QuantWeight, scheme: Scheme) -> QuantWeight:
    """The same numbers on another grid.

    Args:
        weight: Codes [N, K], without a g_idx.
        scheme: One that `holds` them; its activations are not static.

    Returns:
        A weight of `scheme` that stands for the same numbers, with scales in the dtype that they had.
    """
    parts = weight.scheme.group_of(weight.in_features) // scheme.group_of(weight.in_features)
    scales = weight.scales.repeat_interleave(parts, 1)
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, weight.scheme.middle, dtype=torch.uint8)
    zeros = zeros.repeat_interleave(parts, 1)
    if not scheme.sym:
        return QuantWeight(weight.codes, scales, scheme, zeros)
    shift = (scheme.middle - zeros.to(torch.int16)).repeat_interleave(scheme.group_of(weight.in_features), 1)
    return QuantWeight((weight.codes.to(torch.int16) + shift).to(torch.uint8), scales, scheme)
