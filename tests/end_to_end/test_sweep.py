"""All architectures of the installed transformers that write text: what would be quantized in each, and the round for
those that are unlike the others. scripts/benchmarks/architectures.py takes all of them through the round."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from models import relative_error
from packaging.version import Version
from rounds import SCHEME, quantizable, quantized_share, round_trip
from tiny import ATTEMPTS, logits, model_types, tiny_model_that_runs, tiny_skeleton
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lowbit
from lowbit.discovery import choose
from lowbit.layers.linear import LowbitLinear

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "scripts" / "benchmarks" / "results" / "architectures.json"
CAUSAL, SEQ2SEQ, VISION = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"
# what each is here for
ROUNDS = {
    "falcon": CAUSAL,  # a linear class of its own
    "bloom": CAUSAL,  # tied embeddings with a norm behind them
    "granitemoe": CAUSAL,  # experts under other names in checkpoints
    "jetmoe": CAUSAL,  # experts that are not marked
    "llama4_text": CAUSAL,  # experts multiplied all at once, transposed
    "deepseek_v3": CAUSAL,  # latent attention, shared experts, a dense layer first
    "qwen3_next": CAUSAL,  # linear attention
    "jamba": CAUSAL,  # mamba, attention and experts
    "t5": SEQ2SEQ,  # encoder and decoder
    "switch_transformers": SEQ2SEQ,  # a list of experts
    "t5gemma2": VISION,  # vision inside the encoder
    "qwen3_vl_moe": VISION,  # experts that checkpoints hold transposed
    "hrm_text": CAUSAL,  # queries, keys, values and gates in one matrix
    "step3p7": VISION,  # gates and up projections of all experts in two tensors
    "inkling2_text": CAUSAL,  # rows of gates and up projections in turn
}


def skeletons():
    for task, model_type in model_types():
        for attempt in ATTEMPTS if model_type != "pi0" else ():  # it writes movements
            try:
                yield model_type, tiny_skeleton(task, model_type, **attempt)
                break
            except Exception:  # not built: the script's results say why
                continue


def test_linears_of_every_language_model_are_found():
    short = {}
    count = 0
    for model_type, model in skeletons():
        wanted = quantizable(model)
        chosen, _ = choose(model, lowbit.Recipe(SCHEME))
        share = quantized_share(wanted, chosen)
        count += 1
        if share < 0.95 or not wanted.keys() >= chosen.keys():
            short[f"{model_type} {type(model).__name__}"] = share, sorted(wanted.keys() ^ chosen.keys())[:4]
    print(f"{count - len(short)} of {count} architectures")
    assert not short
    assert count >= 0.8 * len(list(model_types()))  # or whatever keeps them from being built hides all of them


@pytest.mark.parametrize("model_type", ROUNDS)
def test_round(model_type, tmp_path):
    if model_type == "qwen3_vl_moe" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers looks for packed parameters of transposed experts when it saves prepared ones")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model, inputs = tiny_model_that_runs(ROUNDS[model_type], model_type)
    facts = round_trip(ROUNDS[model_type], model, inputs, tmp_path)
    assert facts["share"] >= 0.95 and facts["to_original"] < 0.7


@pytest.mark.parametrize("include_vision", [False, True])
def test_vision_tower_is_quantized_with_include_vision_only(include_vision, tmp_path):
    model, inputs = tiny_model_that_runs(VISION, "llava")
    image = torch.full((1, (32 // model.config.vision_config.patch_size) ** 2), model.config.image_token_id)
    inputs = {"input_ids": torch.cat([image, inputs["input_ids"]], 1), "pixel_values": torch.randn(1, 3, 32, 32)}
    model.save_pretrained(tmp_path / "dense")
    lowbit.quantize(tmp_path / "dense", tmp_path / "out", scheme=SCHEME, include_vision=include_vision)
    quantized = lowbit.load(tmp_path / "out")
    parts = {name.split(".")[1] for name, m in quantized.named_modules() if isinstance(m, LowbitLinear)}
    assert parts == {"language_model"} | ({"vision_tower", "multi_modal_projector"} if include_vision else set())
    actual = logits(quantized, inputs)
    fly = type(model).from_pretrained(
        tmp_path / "dense",
        quantization_config=lowbit.LowbitConfig(SCHEME.bits, SCHEME.group_size, include_vision=include_vision),
    )
    assert torch.equal(logits(fly, inputs), actual)
    assert relative_error(actual, logits(quantized.dequantize(), inputs)) < 1e-5


def test_results_are_of_all_architectures():
    data = json.loads(RESULTS.read_text())
    assert data["facts"]["transformers"] >= "5" and data["architectures_ok"] >= 110
    assert all(row["status"] == "ok" or row["reason"] for row in data["rows"])
    ok = [row for row in data["rows"] if row["status"] == "ok"]
    assert len(ok) == data["ok"] and len({row["architecture"] for row in ok}) >= data["architectures_ok"]
