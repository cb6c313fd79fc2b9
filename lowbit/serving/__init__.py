"""Which engines serve a quantized checkpoint, and on how many GPUs."""

from lowbit.serving.model import fused_units, modules_of, splits
from lowbit.serving.rules import COLUMN, RANKS, ROW, RULES, Module
from lowbit.serving.verdict import Verdict, modules_taken, verdicts

__all__ = [
    "COLUMN", "RANKS", "ROW", "RULES", "Module", "Verdict", "fused_units", "modules_of", "modules_taken", "splits",
    "verdicts",
]  # fmt: skip
