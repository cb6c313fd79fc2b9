"""Whole checkpoints: quantized from a plan made of headers, converted, dequantized."""

from lowbit.pipeline.convert import convert, dequantize
from lowbit.pipeline.half import convert_dtype, plan_dtype
from lowbit.pipeline.preview import Preview, plan
from lowbit.pipeline.run import quantize

__all__ = ["Preview", "convert", "convert_dtype", "dequantize", "plan", "plan_dtype", "quantize"]
