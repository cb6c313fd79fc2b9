"""The floating-point formats of compressed-tensors: FP8 by tensor, row or block, MXFP8, MXFP4 and NVFP4.

`x.weight` in float8, or `x.weight_packed` in E2M1, with `x.weight_scale`, which is E8M0 where it is bytes. NVFP4 has
scales in float8, and `x.weight_global_scale` divides them. Integers are `lowbit.formats.compressed_tensors`; where a
checkpoint has groups of both kinds (`mixed-precision`), `remaining` is what that reads of its config.
"""

from collections.abc import Iterable, Iterator, Mapping
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
    for name, codes in tensors.items():
        base, suffix = name.rpartition(".weight")[0], name.rpartition(".")[2]
        if (suffix == "weight" and codes.dtype in FLOAT8) or (_is_packed(name) and codes.dtype == torch.uint8):
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


def remaining(config: Mapping, decoded: Iterable[str]) -> dict | None:
    """The config of a checkpoint whose floating-point weights are plain ones; None where it has no groups of integers.

    Args:
        config: Its `quantization_config`.
        decoded: The names of these weights. They are listed as ignored: a group of integers may have targets that
            fit them too.
    """
    groups = record(_Config, config, "quantization_config").config_groups or {}
    integers = [name for name, each in groups.items() if each.weights is not None and each.weights.type == "int"]
    if not integers:
        return None
    ignored = [*(config.get("ignore") or ()), *(name.removesuffix(".weight") for name in decoded)]
    return {**config, "config_groups": {name: config["config_groups"][name] for name in integers}, "ignore": ignored}


def _is_packed(name: str) -> bool:
    return name.endswith(".weight_packed")
