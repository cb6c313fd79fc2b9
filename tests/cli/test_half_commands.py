"""`--scheme FP16` and `--scheme BF16` of `quantize` and `plan`."""

import json

import pytest
from folders import read_json, save_chat_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("half") / "dense")


def test_quantize_and_what_reads_it(dense, cli, tmp_path):
    out = tmp_path / "out"
    done = cli("quantize", dense, "-o", out, "--scheme", "bf16")
    assert done.code == 0 and "tensors converted to BF16" in done.out
    assert "lowbit quantize" in read_json(out / "lowbit_report.json")["command"]
    assert cli("verify", out, "--reference", dense).code == 0
    assert "none" in cli("inspect", out).out and "bfloat16" in cli("inspect", out).out
    report = json.loads(cli("quantize", dense, "-o", tmp_path / "j", "--scheme", "FP16", "--json").out)
    planned = json.loads(cli("plan", dense, "--scheme", "FP16", "--json").out)
    assert report["output_bytes"] == planned["output_bytes"]


def test_dry_run_writes_nothing(dense, cli, tmp_path):
    done = cli("quantize", dense, "-o", tmp_path / "out", "--scheme", "FP16", "--dry-run")
    assert done.code == 0 and "nothing was written" in done.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    (["--method", "gptq"], ["--group-size", "32"], ["--ignore", "x"], ["--seqlen", "7"], ["--format", "awq"],
     ["--asym"], ["--lm-head"], ["--scale-search", "mse"]),
)  # fmt: skip
def test_options_of_grids_are_refused(options, dense, cli, tmp_path):
    done = cli("quantize", dense, "-o", tmp_path / "out", "--scheme", "FP16", *options)
    assert done.code == 2 and "leave it out" in done.err and not (tmp_path / "out").exists()


def test_clamp_is_refused_for_grids(dense, cli, tmp_path):
    done = cli("quantize", dense, "-o", tmp_path / "out", "--clamp")
    assert done.code == 2 and "--clamp" in done.err
