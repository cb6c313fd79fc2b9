"""The definition of a quantized linear, in plain torch: what every backend must equal."""

import torch

from lowbit.grid import dequantize
from lowbit.qweight import QuantWeight


def linear(x: torch.Tensor, qweight: QuantWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features], in x.dtype, through the dequantized weight."""
    return torch.nn.functional.linear(x, dequantize(qweight, x.dtype), bias)
