"""Several processes on one model: who they are, and what part of a weight each of them has."""

from lowbit.parallel.part import EXPERTS, INPUTS, OUTPUTS, Part
from lowbit.parallel.ranks import Ranks, ranks_of

__all__ = ["EXPERTS", "INPUTS", "OUTPUTS", "Part", "Ranks", "ranks_of"]
