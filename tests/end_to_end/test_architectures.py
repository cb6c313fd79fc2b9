"""Quantize -> load -> generate for many architectures, with no code that knows any of them."""

import pytest
import torch
from covering import slow_but
from models import ARCHITECTURES, relative_error, save_tiny, token_ids
from tiny import tiny_model_that_runs
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.hf import LowbitConfig

SCHEME = lowbit.Scheme(4, 32, True)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


# Linears, transposed ones, several in one, experts: of the others, some of the properties of these
each_architecture = pytest.mark.parametrize("name", slow_but(("llama", "gpt2", "phi3", "gpt_oss"), ARCHITECTURES))


@each_architecture
def test_quantize_load_generate(name, tmp_path):
    source = save_tiny(tmp_path / "dense", name)
    report = lowbit.quantize(source, tmp_path / "quantized", scheme=SCHEME)
    # embeddings, the head and norms are all that is left alone in these models
    dense = AutoModelForCausalLM.from_pretrained(source)
    left = [m.weight for m in dense.modules() if isinstance(m, torch.nn.Embedding)] + [
        dense.get_output_embeddings().weight
    ]
    left = {id(p) for p in left}
    quantizable = sum(p.numel() for p in dense.parameters() if p.ndim >= 2 and id(p) not in left)
    assert report.quantized_share * report.source_bytes >= 0.95 * quantizable * 4

    quantized = lowbit.load(tmp_path / "quantized")
    actual = logits(quantized)
    generated = quantized.generate(token_ids(8), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 12)
    # the loaded model computes what its dequantized weights compute, and those are near the original's
    assert relative_error(actual, logits(dense)) < 0.5
    assert relative_error(actual, logits(quantized.dequantize())) < 1e-5


@each_architecture
def test_on_the_fly_equals_offline_and_saves_the_same_checkpoint(name, tmp_path):
    source = save_tiny(tmp_path / "dense", name)
    lowbit.quantize(source, tmp_path / "offline", scheme=SCHEME)
    fly = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig(4, 32))
    offline = lowbit.load(tmp_path / "offline")
    assert torch.equal(logits(fly), logits(offline))
    for model, folder in ((fly, "fly"), (offline, "again")):
        model.save_pretrained(tmp_path / folder)
        saved = lowbit.load(tmp_path / folder)
        assert torch.equal(logits(saved), logits(offline))


def test_experts_that_are_called_in_their_own_way_are_rounded(tmp_path):
    model, _ = tiny_model_that_runs("AutoModelForCausalLM", "jetmoe")
    model.save_pretrained(tmp_path / "dense")
    report = lowbit.quantize(
        tmp_path / "dense", tmp_path / "out", scheme=SCHEME, method="gptq", dataset=token_ids(96).view(3, 32)
    )
    calibrated = {layer["name"] for layer in report.layers if "output_error" in layer}
    rounded = {layer["name"] for layer in report.layers} - calibrated
    assert len(calibrated) == 2 and all(name.endswith("kv_proj.weight") for name in calibrated)
    assert len(rounded) == 8 and all("linear" in name for name in rounded)
    assert relative_error(logits(lowbit.load(tmp_path / "out")), logits(model)) < 0.5
