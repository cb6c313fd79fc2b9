"""lowbit merge: what it prints, and what scripts read."""

import json

import pytest
import torch
from folders import read_json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lowbit


@pytest.fixture(scope="module")
def adapter(chat_model, tmp_path_factory):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    model.save_pretrained(folder)
    return folder


def test_the_table_and_the_report(done, chat_model, adapter, tmp_path):
    said = done("merge", chat_model, adapter, "-o", tmp_path / "out", "--heldout-tokens", "64")
    assert "2 tensors merged" in said.out and "mean KL divergence" in said.out and "quantized again" not in said.out
    report = read_json(tmp_path / "out" / "lowbit_report.json")
    assert report["adapter"] == str(adapter) and report["quality"]["kl_mean"] < 1e-6
    assert report["command"].startswith("lowbit merge ")
    assert "perplexity" in done("eval", tmp_path / "out", "--num-tokens", "64").out


def test_json_of_a_quantized_model(done, chat_model, adapter, tmp_path):
    lowbit.quantize(chat_model, tmp_path / "base", scheme="W4A16-G32")
    words = ("--heldout-tokens", "64", "--json")
    said = json.loads(done("merge", tmp_path / "base", adapter, "-o", tmp_path / "out", *words).out)
    assert (said["requantized"], said["method"], said["format"]) == (2, "rtn", "compressed-tensors")
    assert 0 < said["quality"]["kl_mean"] < 0.2
    assert done("verify", tmp_path / "out").code == 0
    assert "2 weights" not in done("report", tmp_path / "out", "-o", tmp_path / "page.html").out


def test_nothing_is_measured_where_nobody_wants_it(done, chat_model, adapter, tmp_path):
    words = ("-o", tmp_path / "out", "--no-compare", "--json")
    assert json.loads(done("merge", chat_model, adapter, *words).out)["quality"] is None


def test_a_wrong_adapter_is_one_line(cli, chat_model, tmp_path):
    outcome = cli("merge", chat_model, chat_model, "-o", tmp_path / "out")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "holds no adapter of PEFT" in outcome.err
    assert not (tmp_path / "out").exists()
