"""The floating-point formats of compressed-tensors: FP8 by tensor, row or block, MXFP8, MXFP4 and NVFP4.

`x.weight` in float8, or `x.weight_packed` in E2M1, with `x.weight_scale`, which is E8M0 where it is bytes. NVFP4 has
scales in float8, and `x.weight_global_scale` divides them. Integers are `lowbit.formats.compressed_tensors`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.encodings.blocks import FLOAT8, block_scaled, companion
from lowbit.checkpoint.layout import TensorInfo
from lowbit.errors import InputError
from lowbit.guards.records import record

_UNUSED = ("input_scale", "input_global_scale", "input_zero_point")


@dataclass(frozen=True)
class _Weights:
    type: str = "int"
    block_structure: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Group:
    weights: _Weights | None = None


@dataclass(frozen=True)
class _Config:
    config_groups: dict[str, _Group] | None = None


def weights(tensors: Mapping[str, TensorInfo], config: Mapping) -> Iterator[EncodedWeight]:
    groups = (record(_Config, config, "quantization_config").config_groups or {}).values()
    structures = {each.weights.block_structure for each in groups if each.weights and each.weights.type == "float"}
    if not structures:
        return
    blocks = [(block[0], block[1]) for block in structures if block is not None and len(block) == 2]
    integers = next((name for name, info in tensors.items() if _is_packed(name) and info.dtype == torch.int32), None)
    for name, codes in tensors.items():
        base, suffix = name.rpartition(".weight")[0], name.rpartition(".")[2]
        if (suffix == "weight" and codes.dtype in FLOAT8) or (_is_packed(name) and codes.dtype == torch.uint8):
            if integers is not None:
                raise InputError(
                    f"{name} holds floating-point codes and {integers} integers: expected one of both only"
                )
            if f"{base}.weight_zero_point" in tensors:
                raise InputError(f"{base}.weight_zero_point is in the checkpoint: floating-point codes have no zeros")
            yield block_scaled(
                f"{base}.weight",
                codes,
                companion(tensors, codes, f"{base}.weight_scale"),
                blocks=blocks,
                global_scale=tensors.get(f"{base}.weight_global_scale"),
                is_divisor=True,
                unused=[f"{base}.{name}" for name in _UNUSED],
            )


def _is_packed(name: str) -> bool:
    return name.endswith(".weight_packed")
