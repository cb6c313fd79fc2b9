"""Weights as other tools store them in floating point of eight and four bits."""

import math

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's block FP8 of a weight of any size (`inference/kernel.py` of DeepSeek-V3, in plain torch)."""
    rows, columns = (math.ceil(n / b) for n, b in zip(weight.shape, block, strict=True))
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED = {
    "tensor": ("float-quantized", FLOAT8 | {"strategy": "tensor"}),
    "channel": ("float-quantized", FLOAT8 | {"strategy": "channel"}),
    "block": ("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}),
    "mxfp8": ("mxfp8-quantized", FLOAT8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT8 | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT8 | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
}


def compressed(weight: torch.Tensor, kind: str) -> tuple[dict, torch.Tensor, dict]:
    """(tensors that compressed-tensors writes, what it reads from them, its config)."""
    name, args = COMPRESSED[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=name)
    rows = len(weight)
    largest = weight.float().abs()
    if kind == "tensor":
        scales = largest.max().view(1) / 448
    elif kind == "channel":
        scales = largest.amax(1, keepdim=True) / 448
    elif kind == "block":
        scales = fp8_blocks(weight, (128, 128))[1]
    else:
        size, top = args["group_size"], {"mxfp8": 448, "mxfp4": 6, "nvfp4": 6}[kind]
        scales = largest.view(rows, -1, size).amax(-1) / top
    state = {"weight": weight}
    if kind.startswith("mx"):
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    if kind == "nvfp4":
        state["weight_global_scale"] = (448 * 6 / largest.max()).view(1)
        scales = (scales * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    state["weight_scale"] = scales.to(torch.float32 if kind == "nvfp4" else torch.bfloat16)
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    read = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": {"weights": args}}}
    return {f"x.{key}": value for key, value in stored.items()}, read, config
