"""`--smooth` of `quantize` and `plan`."""

import json

import pytest
import torch
from folders import read_json, save_chat_model
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("smooth") / "dense")
    ids = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, folder.with_name("ids.safetensors"))
    return folder


def test_quantize_and_verify(dense, cli, tmp_path):
    out, ids = tmp_path / "out", dense.with_name("ids.safetensors")
    options = ["--group-size", "16", "--smooth", "0.5", "--dataset", ids, "--num-samples", "4", "--seqlen", "32"]
    done = cli("quantize", dense, "-o", out, *options)
    assert done.code == 0, done.err
    assert "inputs scaled in front of 8 of 8 groups of linears" in done.out
    assert read_json(out / "lowbit_report.json")["recipe"]["smooth"] == 0.5
    assert cli("verify", out, "--reference", dense).code == 0
    planned = json.loads(cli("plan", dense, *options[:4], "--json").out)
    assert planned["output_bytes"] == read_json(out / "lowbit_report.json")["output_bytes"]


@pytest.mark.parametrize("command", (["plan"], ["quantize", "-o", "out"]))
def test_wrong_alpha(command, dense, cli):
    done = cli(*command, dense, "--smooth", "2")
    assert done.code == 2 and "a number from 0 to 1" in done.err
