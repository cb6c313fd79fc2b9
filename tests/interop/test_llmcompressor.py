"""lowbit runs what llm-compressor writes. (What lowbit writes in that format: tests/end_to_end/test_interop.py.)"""

import pytest
import torch
from clients import examples, logits, save_dense
from models import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit

llmcompressor = pytest.importorskip("llmcompressor")


@pytest.mark.parametrize("symmetric", (True, False), ids=("sym", "asym"))
def test_lowbit_runs_what_llmcompressor_writes(symmetric, tmp_path):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier

    dense = save_dense(tmp_path / "dense")
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    llmcompressor.oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(dense),
        dataset=Dataset.from_list(examples()),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=8,
        max_seq_length=32,
        pipeline="sequential",
    )
    expected = logits(model)  # of the rounded weights, which it leaves in place
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    assert relative_error(logits(lowbit.load(tmp_path / "theirs")), expected) < 1e-5
