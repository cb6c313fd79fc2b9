"""Budgets on the command line: what is typed, and what is shown."""

import json

import numpy as np
import pytest
from models import save_tiny

from lowbit.quantization.allocation import stored

DATA = ("--num-samples", "4", "--seqlen", "24")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(stored, "cache_root", lambda: folder)


@pytest.fixture
def model(tmp_path):
    ids = np.random.default_rng(0).integers(3, 128, (8, 24))
    np.save(tmp_path / "ids.npy", ids)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    return str(save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, **heads))


def test_what_is_chosen_is_planned_written_and_inspected(model, cli, tmp_path):
    asked = (model, "--bits", "3.5", "--dataset", tmp_path / "ids.npy", *DATA)
    shown = cli("plan", *asked)
    assert shown.code == 0, shown.out
    assert "expected mean KL" in shown.out and "q_proj+k_proj+v_proj" in shown.out and "dense" not in shown.out
    planned = json.loads(cli("plan", *asked, "--json").out)
    made = cli("quantize", *asked, "-o", tmp_path / "out", "--json")
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["allocation"] == planned["allocation"]
    assert report["bits_per_weight"] == planned["bits_per_weight"] <= 3.5
    schemes = {module["name"]: module["scheme"] for module in planned["modules"]}
    assert {layer["name"].removesuffix(".weight"): layer["scheme"] for layer in report["layers"]} == schemes
    inspected = cli("inspect", tmp_path / "out")
    assert all(scheme in inspected.out for scheme in set(schemes.values()))
    assert "chosen for --bits 3.5" in inspected.out and "the best of other budgets: " in inspected.out
    shown = json.loads(cli("inspect", tmp_path / "out", "--json").out)["allocation"]
    assert shown["predicted_kl"] == report["allocation"]["predicted_kl"]
    assert sum(part["bytes"] for part in shown["parts"]) == sum(u["bytes"] for u in report["allocation"]["units"])


def test_what_running_takes_is_shown(model, cli, tmp_path):
    asked = (model, "--context", "64", "--batch", "2")
    shown = cli("plan", *asked)
    assert "running 2 x 64 tokens: peak memory " in shown.out and "int8" not in shown.out
    assert "int8 cache" in cli("plan", *asked, "--kv-cache", "int8").out
    data = ("--dataset", tmp_path / "ids.npy", *DATA)
    memory = json.loads(cli("plan", *asked, "--fit", "3MB", *data, "--json").out)["memory"]
    made = cli("quantize", *asked, "--fit", "3MB", *data, "-o", tmp_path / "out", "--json")
    assert json.loads(made.out)["allocation"]["memory"] == memory and memory["peak"] <= 3_000_000


def test_a_dry_run_shows_the_same_and_writes_nothing(model, cli, tmp_path):
    asked = (model, "--size", "10MB", "--dataset", tmp_path / "ids.npy", *DATA)
    shown = cli("quantize", *asked, "--dry-run")
    assert shown.code == 0, shown.out
    assert "expected mean KL" in shown.out and "nothing was written" in shown.out
    assert "everything fits dense, as the model is" in shown.out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--bits", "0.5"), "0.5 bits cannot be kept"),
        (("--bits", "x"), "Invalid value for '--bits'"),
        (("--size", "3XB"), "size '3XB' is not understood"),
        (("--size", "1GB", "--scheme", "W4A16"), "leave --scheme out"),
        (("--max-kl", "-1"), "max_kl is -1.0; expected a number above 0"),
        (("--bits", "3.5", "--engine", "tgi"), "engine 'tgi' is not known"),
        (("--bits", "3.5", "--scheme", "FP16"), "--scheme and --bits say the same thing"),
    ],
)
def test_wrong_budgets_are_one_line(model, cli, tmp_path, options, message):
    result = cli("quantize", model, "-o", tmp_path / "out", *options, "--dataset", tmp_path / "ids.npy", *DATA)
    assert result.code != 0
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err and not (tmp_path / "out").exists()
