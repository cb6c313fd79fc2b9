"""Output embeddings that are quantized when a model is loaded: what runs, and what is saved afterwards."""

import json

import pytest
import torch
from models import relative_error, save_tiny, token_ids
from safetensors.torch import load_file

import lowbit
from lowbit.errors import InputError, UsageError
from lowbit.formats import compressed_tensors as packed_format
from lowbit.hf.head import quantize_head
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.grid import dequantize
from lowbit.numerics.scheme import Scheme
from lowbit.quantizers import get_quantizer


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def expected_head(weight, scheme):
    return get_quantizer("rtn").quantize(weight, {}, scheme, {"scale_search": "minmax"})[0]


@pytest.fixture(scope="module", params=["dense", "quantized"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, kind, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "dense", dtype=torch.float32, tie_word_embeddings=request.param)
    lowbit.quantize(root / "dense", root / "quantized", group_size=32)
    return root / kind


def test_quantized_head_survives_saving(folder, kind, tmp_path):
    before = load_file(folder / "model.safetensors")
    tied = "lm_head.weight" not in before
    dense = before["model.embed_tokens.weight" if tied else "lm_head.weight"]
    expected = expected_head(dense, Scheme(8, 32))
    model = lowbit.load(folder, lm_head="W8A16-G32")
    # nothing but the head has changed
    without = lowbit.load(folder)
    without.lm_head.weight = torch.nn.Parameter(dequantize(expected, torch.float32))
    assert relative_error(logits(model), logits(without)) < 1e-6
    assert relative_error(logits(model), logits(lowbit.load(folder))) > 1e-4
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])

    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    head = {f"lm_head.{name}": tensor for name, tensor in packed_format.pack(expected).items()}
    wanted = {name: tensor for name, tensor in before.items() if name != "lm_head.weight"} | head
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    stored = config["quantization_config"]
    (group,) = [group for group in stored["config_groups"].values() if "lm_head" in group["targets"]]
    assert group["weights"]["num_bits"] == 8 and "lm_head" not in stored["ignore"]
    assert ("model.layers.0.self_attn.q_proj" in stored["ignore"]) is (kind == "dense")
    assert torch.equal(logits(lowbit.load(tmp_path)), logits(model))


def test_dequantizing_gives_a_model_that_saves(folder, tmp_path):
    model = lowbit.load(folder, lm_head="W8A16-G128")
    assert model.lm_head.scheme == Scheme(8, 64)  # what fits 64 inputs
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, LowbitLinear) for module in dense.modules())
    dense.save_pretrained(tmp_path)
    assert relative_error(logits(lowbit.load(tmp_path)), expected) < 1e-6


def test_second_or_unknown_scheme_of_the_head_is_refused(folder, tmp_path):
    lowbit.load(folder, lm_head="W8A16-G32").save_pretrained(tmp_path / "again")
    with pytest.raises(UsageError, match="holds its output embedding quantized, as W8A16-G32"):
        lowbit.load(tmp_path / "again", lm_head="W4A16")
    with pytest.raises(UsageError, match="scheme 'int8' is not known"):
        lowbit.load(folder, lm_head="int8")


def test_heads_that_are_tied_to_more_stay(tmp_path):
    save_tiny(tmp_path, tie_word_embeddings=True)
    model = lowbit.load(tmp_path)
    model.all_tied_weights_keys["model.other.weight"] = "model.embed_tokens.weight"
    with pytest.raises(UsageError, match=r"tied to model\.other\.weight too"):
        quantize_head(model, Scheme(8), tmp_path)
    model.lm_head.weight.data[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"lm_head\.weight holds NaN"):
        quantize_head(model, Scheme(8), tmp_path)
