"""Models that others have quantized, from their files to ours: quantized again, verified, loaded, the same logits."""

import shutil
from pathlib import Path

import pytest
import torch
from encoded import FP8, compressed, fp8_blocks
from folders import edit_config, stored_tensors
from models import relative_error, save_tiny, token_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import InputError

# All experts are used: which are chosen would change with the smallest error
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts_per_tok": 4}


def rewritten(folder: Path, quantization: dict, encode) -> Path:
    """The model in `folder` with each matrix of a linear or an expert as `encode(name, weight)` stores it."""
    target = folder.with_name("encoded")
    shutil.copytree(folder, target)
    made = {}
    for name, weight in stored_tensors(folder).items():
        made |= encode(name, weight) if name.endswith("proj.weight") else {name: weight}
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    edit_config(target, quantization_config=quantization)
    return target


def as_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = fp8_blocks(weight, (64, 64))
    return {name: codes, f"{name}_scale_inv": scales}


def as_nvfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    stored, _, _ = compressed(weight, "nvfp4")
    return {name.removesuffix("weight") + key.removeprefix("x."): part for key, part in stored.items()}


def as_int8_of_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """LLM.int8 of bitsandbytes."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() / largest.unsqueeze(1) * 127).round().to(torch.int8)
    return {name: codes, f"{name.removesuffix('weight')}SCB": largest}


def gpt_oss_in_mxfp4(tmp_path: Path) -> Path:
    """Experts as gpt-oss has them: blocks of 32 inputs, transposed in memory."""
    folder = save_tiny(tmp_path / "plain", "gpt_oss", torch.bfloat16, **SIZES, num_hidden_layers=2)
    target, rng = folder.with_name("encoded"), torch.Generator().manual_seed(0)
    shutil.copytree(folder, target)
    made = {}
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


def encoded_model(kind: str, architecture: str, tmp_path: Path) -> Path:
    if kind == "mxfp4":
        return gpt_oss_in_mxfp4(tmp_path)
    folder = save_tiny(tmp_path / "plain", architecture, torch.bfloat16, **SIZES)
    config, encode = {
        "fp8": (FP8 | {"weight_block_size": [64, 64]}, as_fp8),
        "nvfp4": (compressed(torch.ones(16, 16).bfloat16(), "nvfp4")[2], as_nvfp4),
        "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, as_int8_of_rows),
    }[kind]
    return rewritten(folder, config, encode)


CASES = [("fp8", "llama"), ("fp8", "qwen3_moe"), ("nvfp4", "llama"), ("nvfp4", "qwen3_moe"), ("int8", "llama"),
         ("mxfp4", "gpt_oss")]  # fmt: skip


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_quantize_verify_load(kind, architecture, tmp_path, caplog):
    source, plain, made = encoded_model(kind, architecture, tmp_path), tmp_path / "dense", tmp_path / "made"
    done = lowbit.dequantize(source, plain)
    assert done.weights > 0 and done.source_bytes < done.output_bytes
    original = AutoModelForCausalLM.from_pretrained(plain)
    report = lowbit.quantize(source, made, scheme="W8A16-G32")
    assert "is quantized already" in caplog.text
    assert report.source_bytes == done.source_bytes
    assert lowbit.verify(made, reference=source).ok
    wanted = original(token_ids()).logits
    assert relative_error(lowbit.load(made)(token_ids()).logits, wanted) < 0.05
    assert torch.equal(lowbit.load(source)(token_ids()).logits, wanted)
    preview = lowbit.plan(source, scheme="W8A16-G32")
    assert preview.output_bytes == report.output_bytes and preview.source_bytes == report.source_bytes


@pytest.mark.parametrize(("kind", "architecture"), [("fp8", "llama"), ("fp8", "qwen3_moe"), ("mxfp4", "gpt_oss")])
def test_what_transformers_decodes_itself_is_the_same(kind, architecture, tmp_path):
    """On CPUs it decodes block FP8 and MXFP4 while it loads them."""
    source = encoded_model(kind, architecture, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    ours = lowbit.load(source).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_integers_on_the_grid_that_is_asked_for_are_kept(tmp_path):
    source = save_tiny(tmp_path / "plain", dtype=torch.bfloat16)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    lowbit.quantize(source, first, scheme="W4A16-G32")
    lowbit.quantize(first, again, scheme="W4A16-G32")
    assert all(torch.equal(tensor, stored_tensors(again)[name]) for name, tensor in stored_tensors(first).items())
    lowbit.quantize(first, other, scheme="W8A16-G32")
    assert lowbit.verify(other, reference=first).ok
    wanted = lowbit.load(first)(token_ids()).logits
    assert relative_error(lowbit.load(other)(token_ids()).logits, wanted) < 0.05


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_integers_of_other_formats(tmp_path, format):
    lowbit.quantize(save_tiny(tmp_path / "plain"), tmp_path / "first", scheme="W4A16_ASYM-G32")
    source = tmp_path / format
    lowbit.convert(tmp_path / "first", source, format=format)
    lowbit.quantize(source, tmp_path / "made", scheme="W8A16-G32")
    assert lowbit.verify(tmp_path / "made", reference=source).ok
    wanted = lowbit.load(source)(token_ids()).logits
    assert relative_error(lowbit.load(tmp_path / "made")(token_ids()).logits, wanted) < 0.05


def test_a_calibrated_run_takes_them_too(tmp_path):
    source = encoded_model("fp8", "llama", tmp_path)
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    lowbit.quantize(source, tmp_path / "made", scheme="W4A16-G32", method="gptq", dataset=ids)
    assert lowbit.verify(tmp_path / "made", reference=source).ok


def test_unknown_methods_and_conversions_are_refused_by_name(tmp_path):
    source = encoded_model("fp8", "llama", tmp_path)
    with pytest.raises(InputError, match=r"is stored in fp8 .* which no format here holds"):
        lowbit.convert(source, tmp_path / "out", format="gptq")
    edit_config(source, quantization_config={"quant_method": "hqq"})
    with pytest.raises(InputError, match=r"is quantized already \(hqq\)"):
        lowbit.quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
