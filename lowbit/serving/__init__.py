"""Which engines serve a quantized checkpoint, and on how many GPUs."""

from lowbit.serving.model import fused_units, modules_of, splits
from lowbit.serving.rules import COLUMN, ROW, RULES, Module
from lowbit.serving.verdict import Verdict, verdicts

__all__ = ["COLUMN", "ROW", "RULES", "Module", "Verdict", "fused_units", "modules_of", "splits", "verdicts"]
