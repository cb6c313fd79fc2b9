"""Whole checkpoints: quantized from a plan made of headers, converted, dequantized."""

from lowbit.pipeline.convert import convert, dequantize
from lowbit.pipeline.run import quantize

__all__ = ["convert", "dequantize", "quantize"]
