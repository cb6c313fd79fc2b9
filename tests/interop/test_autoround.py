"""lowbit runs what AutoRound writes, in each of its formats."""

from types import SimpleNamespace

import pytest
import torch
from clients import HALF, examples, logits, plain_logits, save_dense
from models import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit

auto_round = pytest.importorskip("auto_round")


@pytest.mark.parametrize("format", ("auto_gptq", "auto_awq", "llm_compressor"))
def test_lowbit_runs_what_autoround_writes(format, tmp_path):
    dense = save_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    client = auto_round.AutoRound(
        model, tokenizer, scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu",
        dataset=[SimpleNamespace(**row) for row in examples()],
    )  # fmt: skip
    client.quantize_and_save(str(tmp_path / "theirs"), format=format)
    (folder,) = [file.parent for file in (tmp_path / "theirs").rglob("config.json")]
    ours = lowbit.load(folder)
    assert relative_error(logits(ours), plain_logits(folder, tmp_path / "plain")) < HALF
    assert relative_error(logits(ours), logits(AutoModelForCausalLM.from_pretrained(dense).float())) < 0.5
