"""lowbit bench: what it prints and writes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
from folders import ROOT
from models import save_tiny

import lowbit

pytestmark = pytest.mark.slow

QUICK = ("--batch", "1", "--prompt-tokens", "6", "--new-tokens", "4", "--rounds", "1")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bench") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def quantized(plain):
    folder = plain.parent / "quantized"
    lowbit.quantize(plain, folder, scheme="W4A16-G32")
    return folder


def test_shapes(cli, tmp_path):
    done = cli("bench", "--shapes", "tiny", "--layers", 1, *QUICK, "--out", tmp_path / "result.json")
    assert done.code == 0, done.err
    assert "tiny shapes, 1 layers, random weights on " in done.out and "batch 1" in done.out
    assert "not measured: bitsandbytes NF4" in done.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"date", "device", "torch", "transformers"} < set(result["facts"])
    assert [(row["side"], row["loop"]) for row in result["rows"]] == [
        (side, loop) for side in ("lowbit", "unquantized") for loop in ("lowbit", "generate")
    ]
    lowbit_side, dense_side = result["sides"].values()
    assert lowbit_side["weights_bytes"] < dense_side["weights_bytes"] and lowbit_side["kernels"]
    for row in result["rows"]:
        assert row["decode_tokens_per_second"] > 0 and row["prefill_tokens_per_second"] > 0
        assert (row["slower"] is None) == (row["side"] == "lowbit")


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [((), "dequantized"), (("--source", "PLAIN"), "PLAIN")],
    ids=["dequantized", "source"],
)
def test_quantized_model(cli, plain, quantized, arguments, origin):
    arguments = [str(plain) if a == "PLAIN" else a for a in arguments]
    done = cli("bench", quantized, *arguments, *QUICK, "--against", "unquantized", "--lm-head", "W8A16-G128", "--json")
    assert done.code == 0, done.err
    sides = json.loads(done.out)["sides"]
    assert sides["lowbit"]["origin"] == "as stored, head W8A16-G128"
    assert {kind["scheme"] for kind in sides["lowbit"]["kernels"]} == {"W4A16-G32", "W8A16-G64"}
    assert sides["unquantized"]["origin"] == (str(plain) if origin == "PLAIN" else origin)
    assert sides["unquantized"]["kernels"] == []


def test_model_that_is_not_quantized_is_for_the_run(cli, plain):
    done = cli("bench", plain, "--scheme", "W8A16-G32", *QUICK, "--against", "none", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["sides"]["lowbit"]["origin"] == "W8A16-G32, rtn" and len(result["rows"]) == 2
    assert sorted(path.name for path in plain.parent.iterdir()) in (["model"], ["model", "quantized"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected one MODEL"),
        (("reference", "--shapes", "tiny"), "expected one MODEL"),
        (("--shapes", "gpt-5"), "shapes 'gpt-5' are not known; allowed: llama-3.2-1b"),
        (("--shapes", "tiny", "--batch", "0"), "batch is '0'; expected numbers from 1 on"),
        (("--shapes", "tiny", "--batch", "1,x"), "batch is '1,x'"),
        (("--shapes", "tiny", "--concurrency", "many"), "concurrency is 'many'; expected numbers from 1 on"),
        (("--shapes", "tiny", "--against", "vllm"), "cannot compare against 'vllm'; allowed: unquantized"),
        (("--shapes", "tiny", "--layers", "3"), "layers is 3; tiny has 1 to 2"),
        (("reference", "--layers", "1"), "--layers is for --shapes"),
        (("--shapes", "tiny", "--source", "reference"), "--source is for a quantized MODEL"),
        (("reference", "--source", "reference"), "--source is for a quantized MODEL"),
        (("--shapes", "tiny", "--scheme", "W4A4"), "scheme 'W4A4' is not known"),
        (("--shapes", "tiny", "--device-map", "auto"), "device_map is 'auto': expected one device"),
    ],
)  # fmt: skip
def test_wrong_usage(cli, arguments, message):
    done = cli("bench", *arguments)
    assert done.code == 2 and message in done.err and len(done.err.strip().splitlines()) == 1, done


def test_too_large(cli, monkeypatch):
    monkeypatch.setattr("lowbit.bench.contestants.available_memory", lambda: 24 * 10**9)
    done = cli("bench", "--shapes", "llama-3.1-70b")
    assert done.code == 1 and "the weights take 39.5 GB W4A16-G128, and 24.0 GB are free" in done.err


def test_output_without_a_folder(cli, tmp_path):
    done = cli("bench", "--shapes", "tiny", "--out", tmp_path / "none" / "result.json")
    assert done.code == 1 and "there is no folder" in done.err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted(tmp_path):
    """What was measured until then is shown and written."""
    arguments = ["bench", "--shapes", "tiny", "--batch", "1,2", "--rounds", "100000", "--prompt-tokens", "4",
                 "--new-tokens", "3", "--against", "none", "--out", tmp_path / "result.json"]  # fmt: skip
    code = (
        "import sys; from lowbit.bench.repeats import Bench; from lowbit.cli.main import main; keep = Bench._keep\n"
        "def said(self, *arguments):\n    keep(self, *arguments); print('.', file=sys.stderr, flush=True)\n"
        "Bench._keep = said; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    rounds = 0
    while rounds < 3:
        line = process.stderr.readline()
        assert line, process.communicate()
        rounds += line == ".\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "lowbit: error: interrupted: what is shown was measured before"
    assert "batch 1" in out and "Traceback" not in err
    assert json.loads((tmp_path / "result.json").read_text())["rows"]


def test_requests_at_once(cli, quantized, tmp_path):
    """All ways of serving, each with every number of requests."""
    arguments = ("--concurrency", "1,3", "--prompt-tokens", "6", "--new-tokens", "4")
    done = cli("bench", quantized, *arguments, "--out", tmp_path / "result.json")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "result.json").read_text())
    ways = [(rate["how"], rate["requests"]) for rate in result["rates"]]
    assert ways == [(how, n) for how in ("one after the other", "slots", "continuous batching") for n in (1, 3)]
    for rate in result["rates"]:
        made = rate["requests"] * result["new_tokens"]
        assert rate["tokens_per_second"] * rate["seconds"] == pytest.approx(made) and result["left_out"] == {}
    assert "3, continuous batching" in done.out and "1.00x" in done.out


def test_requests_at_once_of_a_model_that_is_not_batched(cli, tmp_path):
    save_tiny(tmp_path / "m", num_hidden_layers=1)
    config = tmp_path / "m" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "no_repeat_ngram_size": 2}))
    done = cli("bench", tmp_path / "m", "--concurrency", "1", "--prompt-tokens", "6", "--new-tokens", "4", "--json")
    assert done.code == 0, done.err
    left_out = json.loads(done.out)["left_out"]
    assert set(left_out) == {"slots", "continuous batching"}
    assert all("no_repeat_ngram_size" in reason for reason in left_out.values())
