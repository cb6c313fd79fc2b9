"""Whole models whose linears are stored as other tools store them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from encoded import COMPRESSED, FP8, compressed, fp8_blocks
from folders import edit_config, stored_tensors
from safetensors.torch import save_file

Encode = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def rewritten(folder: Path, target: Path, quantization: dict, encode: Encode) -> Path:
    """The model in `folder` with each matrix of a linear or an expert as `encode(name, weight)` stores it."""
    shutil.copytree(folder, target)
    made = {}
    for name, weight in stored_tensors(folder).items():
        made |= encode(name, weight) if name.endswith("proj.weight") else {name: weight}
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    edit_config(target, quantization_config=quantization)
    return target


def in_mxfp4_of_gpt_oss(folder: Path, target: Path) -> Path:
    """The model in `folder` with experts as gpt-oss has them: random blocks of 32 inputs, transposed in memory."""
    shutil.copytree(folder, target)
    made, rng = {}, torch.Generator().manual_seed(0)
    for name, weight in stored_tensors(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            made[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=rng)
        made[f"{name}_blocks"] = blocks
        made[f"{name}_scales"] = torch.randint(122, 124, blocks.shape[:3], dtype=torch.uint8, generator=rng)
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    edit_config(target, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return target


def as_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = fp8_blocks(weight, (64, 64))
    return {name: codes, f"{name}_scale_inv": scales}


def as_compressed(kind: str) -> Encode:
    """What compressed-tensors writes."""

    def encode(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        stored, _, _ = compressed(weight, kind)
        return {name.removesuffix("weight") + key.removeprefix("x."): part for key, part in stored.items()}

    return encode


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
# As llm-compressor writes a recipe of two modifiers: each group has a format of its own, a regex goes before a class
MIXED = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": COMPRESSED["channel"][1], "format": "float-quantized"},
        "group_1": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
    },
    "ignore": ["lm_head"],
}


def as_mixed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8 in attention, packed integers elsewhere, both as compressed-tensors writes them."""
    if "self_attn" in name:
        return as_compressed("channel")(name, weight)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**INT4), format="pack-quantized")
    scales = (weight.float().view(len(weight), -1, 32).abs().amax(-1) / 7.5).bfloat16()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    return {name.removesuffix("weight") + key: part for key, part in stored.items()}


def as_nvfp4_of_modelopt(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    stored, _, _ = compressed(weight, "nvfp4")
    return {
        name: stored["x.weight_packed"],
        f"{name}_scale": stored["x.weight_scale"],
        f"{name}_scale_2": 1 / stored["x.weight_global_scale"].view(()),
        f"{name.removesuffix('weight')}input_scale": torch.ones(()),
    }


def as_fp8_of_modelopt(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().max() / 448
    return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def as_four_bits_of_bitsandbytes(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    return {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}


def as_int8_of_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """LLM.int8 of bitsandbytes."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() / largest.unsqueeze(1) * 127).round().to(torch.int8)
    return {name: codes, f"{name.removesuffix('weight')}SCB": largest}


# kind -> (its `quantization_config`, what encodes a weight)
ENCODERS: dict[str, tuple[dict, Encode]] = {
    "fp8": (FP8 | {"weight_block_size": [64, 64]}, as_fp8),
    **{each: (compressed(torch.ones(128, 128).bfloat16(), each)[2], as_compressed(each)) for each in COMPRESSED},
    "mixed": (MIXED, as_mixed),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, as_fp8_of_modelopt),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, as_nvfp4_of_modelopt),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, as_int8_of_rows),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, as_four_bits_of_bitsandbytes),
}
