"""Whole checkpoints: quantized from a plan made of headers, converted, dequantized."""

from lowbit.conversion.dtype import convert_dtype, plan_dtype
from lowbit.conversion.formats import convert, dequantize
from lowbit.quantization.preview import Preview, plan
from lowbit.quantization.run import quantize

__all__ = ["Preview", "convert", "convert_dtype", "dequantize", "plan", "plan_dtype", "quantize"]
