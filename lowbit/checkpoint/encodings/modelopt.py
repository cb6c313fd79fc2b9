"""FP8 and NVFP4 of NVIDIA's ModelOpt: `x.weight`, `x.weight_scale`, and for NVFP4 `x.weight_scale_2`.

FP8 has one scale, one a row, or one a block; NVFP4 a float8 scale for 16 inputs, which `weight_scale_2` multiplies.
The layout is that of `modelopt/torch/export/quant_utils.py`, and of what vLLM's `modelopt.py` reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.encodings.blocks import FLOAT8, block_scaled, companion
from lowbit.checkpoint.layout import TensorInfo

# Blocks of FP8_PB_WO
_BLOCKS = [(128, 128)]


def weights(tensors: Mapping[str, TensorInfo], config: Mapping) -> Iterator[EncodedWeight]:
    for name, codes in tensors.items():
        is_float4 = codes.dtype == torch.uint8 and f"{name}_scale_2" in tensors
        if not is_float4 and (codes.dtype not in FLOAT8 or name.endswith("_scale")):  # scales may be float8 too
            continue
        scales = companion(tensors, codes, f"{name}_scale")
        if len(scales.shape) == 4:  # [rows, 1, columns, 1]
            scales = replace(scales, shape=scales.shape[::2])
        yield block_scaled(
            name,
            codes,
            scales,
            blocks=_BLOCKS,
            global_scale=tensors.get(f"{name}_scale_2"),
            unused=[f"{name.removesuffix('weight')}input_scale"],
        )
