"""GPTQ and AWQ folders run as the same model that compressed-tensors gives, and are saved as that."""

import pytest
import torch
from folders import edit_tensors, read_json, stored_tensors
from models import relative_error, save_tiny, token_ids
from transformers import AutoModelForCausalLM
from weights import old_words

import lowbit
from lowbit.errors import InputError
from lowbit.formats.bitpack import unpack
from lowbit.hf import loading_config
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.scheme import Scheme


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("sym", (True, False), ids=("sym", "asym"))
@pytest.mark.parametrize("format", ("gptq", "awq"))
@pytest.mark.parametrize("name", ("llama", "qwen3_moe", "mixtral", "gpt2"))
def test_loads_and_saves(name, format, sym, tmp_path):
    source, scheme = save_tiny(tmp_path / "dense", name), Scheme(4, 32, sym)
    lowbit.quantize(source, tmp_path / "ct", scheme=scheme)
    lowbit.quantize(source, tmp_path / "q", scheme=scheme, format=format)
    expected = logits(lowbit.load(tmp_path / "ct"))
    model = lowbit.load(tmp_path / "q")
    assert torch.equal(logits(model), expected)
    assert {module.scheme for module in model.modules() if isinstance(module, LowbitLinear)} == {scheme}
    model.save_pretrained(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["quantization_config"]["quant_method"] == "compressed-tensors"
    saved, written = stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "ct")
    assert saved.keys() == written.keys() and all(torch.equal(tensor, written[name]) for name, tensor in saved.items())
    assert torch.equal(logits(lowbit.load(tmp_path / "saved")), expected)


@pytest.mark.parametrize("bits", (2, 3, 8))
def test_gptq_of_any_bits_gives_the_logits_of_compressed_tensors(bits, tmp_path):
    source, scheme = save_tiny(tmp_path / "dense"), Scheme(bits, 32, False)
    lowbit.quantize(source, tmp_path / "ct", scheme=scheme)
    lowbit.quantize(source, tmp_path / "q", scheme=scheme, format="gptq")
    assert torch.equal(logits(lowbit.load(tmp_path / "q")), logits(lowbit.load(tmp_path / "ct")))


def test_through_from_pretrained(tmp_path):
    source = save_tiny(tmp_path / "dense")
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16-G32", format="gptq")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", config=loading_config(tmp_path / "q"))
    assert torch.equal(logits(model), logits(lowbit.load(tmp_path / "q")))


def shuffled(folder):
    """Act-order on every module: random codes, so that an order that is dropped shows."""
    rng = torch.Generator().manual_seed(0)

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=rng)].contiguous()

    edit_tensors(folder, change)


def test_act_order(tmp_path):
    """Through LowbitLinear's gather, on its backend, moved and copied: the product of the matrix that g_idx defines."""
    source = save_tiny(tmp_path / "dense")
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16_ASYM-G32", format="gptq")
    plain = logits(lowbit.load(tmp_path / "q"))
    shuffled(tmp_path / "q")
    model = lowbit.load(tmp_path / "q")
    lowbit.dequantize(tmp_path / "q", tmp_path / "plain")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    assert relative_error(logits(model), expected) < 1e-5 < relative_error(plain, expected)
    assert torch.equal(logits(model.to(torch.float32)), logits(model))
    up = model.model.layers[0].mlp.up_proj
    before = up.packed_tensors()
    after = up.unprepare().prepare().packed_tensors()
    assert "weight_g_idx" in before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(InputError, match="act-order, which compressed-tensors cannot hold"):
        model.save_pretrained(tmp_path / "saved")
    assert relative_error(logits(model.dequantize()), expected) < 1e-6


def test_act_order_on_the_packed_cpu_kernel(tmp_path):
    source = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16-G32", format="gptq")
    shuffled(tmp_path / "q")
    lowbit.dequantize(tmp_path / "q", tmp_path / "plain", dtype="float32")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    model = lowbit.load(tmp_path / "q", backend="torch_cpu")
    assert relative_error(logits(model), expected) < 3e-2  # of activations in bf16, through two layers


def test_old_three_bit_checkpoint(tmp_path):
    source = save_tiny(tmp_path / "dense", "qwen3_moe")
    lowbit.quantize(source, tmp_path / "q", scheme="W3A16_ASYM-G32")
    expected = logits(lowbit.load(tmp_path / "q"))

    def change(tensors):
        for base in [name.removesuffix(".weight_shape") for name in tensors if name.endswith(".weight_shape")]:
            rows, columns = tensors[f"{base}.weight_shape"].tolist()
            codes = unpack(tensors[f"{base}.weight_packed"], 3, columns)
            zeros = unpack(tensors[f"{base}.weight_zero_point"].T, 3, rows)
            tensors[f"{base}.weight_packed"] = old_words(codes)
            tensors[f"{base}.weight_zero_point"] = old_words(zeros).T.contiguous()

    edit_tensors(tmp_path / "q", change)
    assert torch.equal(logits(lowbit.load(tmp_path / "q")), expected)
    lowbit.convert(tmp_path / "q", tmp_path / "gptq", format="gptq")
    assert torch.equal(logits(lowbit.load(tmp_path / "gptq")), expected)
