"""MXFP4 of gpt-oss: the experts of a layer as `experts.down_proj_blocks` and `experts.down_proj_scales`.

Blocks are bytes [experts, out_features, in_features / 32, 16], scales E8M0 [experts, out_features, in_features / 32];
the parameter is transposed: [experts, in_features, out_features]. As `convert_moe_packed_tensors` of transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.encodings.blocks import block_scaled, companion, require_dtype
from lowbit.checkpoint.layout import TensorInfo
from lowbit.errors import InputError

_BLOCK_BYTES = 16


def weights(tensors: Mapping[str, TensorInfo], config: Mapping) -> Iterator[EncodedWeight]:
    for name, blocks in tensors.items():
        base = name.removesuffix("_blocks")
        if base != name:
            scales = companion(tensors, blocks, f"{base}_scales")
            require_dtype(blocks, torch.uint8)
            require_dtype(scales, torch.uint8)
            if len(blocks.shape) != 4 or blocks.shape[3] != _BLOCK_BYTES or scales.shape != blocks.shape[:3]:
                raise InputError(
                    f"{name} has shape {list(blocks.shape)} and {scales.name} {list(scales.shape)}, expected "
                    f"[experts, rows, blocks, {_BLOCK_BYTES}] and [experts, rows, blocks]: the checkpoint is damaged"
                )
            yield block_scaled(base, _as_rows(blocks), scales, transposed=True)


def _as_rows(blocks: TensorInfo) -> TensorInfo:
    experts, rows, count, size = blocks.shape
    return replace(blocks, shape=(experts, rows, count * size))
