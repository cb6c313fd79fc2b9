"""Block FP8 of DeepSeek and Qwen, `quant_method: fp8` of transformers: `x.weight` and `x.weight_scale_inv`.

Some checkpoints call the scales `x.scale` or `x.qscale_weight`, and pack experts in E2M1 with E8M0 scales, as bytes
that they call int8. Fused experts have `experts.gate_up_proj_scale_inv`. All of it is what `Fp8Dequantize` of
transformers reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lowbit.checkpoint.encodings import EncodedWeight
from lowbit.checkpoint.encodings.blocks import FLOAT8, block_scaled, companion
from lowbit.checkpoint.layout import TensorInfo
from lowbit.guards.records import record

_UNUSED = ("activation_scale", "input_scale", "qscale_act")


@dataclass(frozen=True)
class _Config:
    weight_block_size: tuple[int, ...] | None = None


def weights(tensors: Mapping[str, TensorInfo], config: Mapping) -> Iterator[EncodedWeight]:
    block = record(_Config, config, "quantization_config").weight_block_size or ()
    for name, codes in tensors.items():
        base = name.removesuffix(".weight")
        scales = (f"{name}_scale_inv", *((f"{base}.scale", f"{base}.qscale_weight") if base != name else ()))
        is_packed = codes.dtype == torch.int8 and any(scale in tensors for scale in scales)
        if codes.dtype in FLOAT8 or is_packed:
            yield block_scaled(
                name,
                codes,
                companion(tensors, codes, *scales),
                blocks=[(block[0], block[1])] if len(block) == 2 else [],
                unused=[f"{base}.{suffix}" for suffix in _UNUSED] + [f"{name}_{suffix}" for suffix in _UNUSED],
            )
