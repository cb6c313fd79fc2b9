"""A compressed-tensors folder as the exits read it, and the float32 matrices that it stands for."""

import torch
from folders import read_json, write_json
from models import ARCHITECTURES, save_tiny
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.conversion.export import ExportSource, export_source
from lowbit.folders.quantized import QuantizedFolder
from lowbit.numerics.grid import dequantize


def open_source(folder) -> ExportSource:
    return export_source(QuantizedFolder(folder))


def quantized_source(folder, name="llama", scheme="W4A16-G32", dtype=torch.bfloat16, options=None, **changes):
    """A tiny model of an architecture, quantized. Its widths are multiples of 128: a group of any size fits."""
    widths = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    widths |= {key: 128 for key in ARCHITECTURES[name][1] if key.endswith("intermediate_size")}
    changes = {**widths, **changes}
    save_tiny(folder / "dense", name, dtype, **changes)
    lowbit.quantize(folder / "dense", folder / "quantized", scheme=scheme, **(options or {}))
    return open_source(folder / "quantized")


def dequantized(source: ExportSource) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its dense name, float32."""
    weights = {f"{name}.weight": dequantize(source.read(name), torch.float32) for name in source.quantized}
    return weights | {name: source.tensor(name).float() for name in source.dense}


def dense_model(source: ExportSource, folder):
    """The transformers model of the dequantized weights, float32."""
    folder.mkdir()
    config = read_json(source.folder / "config.json")
    del config["quantization_config"]
    write_json(folder / "config.json", config | {"dtype": "float32"})
    tensors = {name: tensor.contiguous() for name, tensor in dequantized(source).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)
