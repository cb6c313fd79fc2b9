"""Quantizing a whole checkpoint: plan it from headers, then run the plan."""

from lowbit.pipeline.run import quantize

__all__ = ["quantize"]
