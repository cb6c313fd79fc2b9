"""What budgets choose goes where it is meant to: to GGUF and MLX exactly, to plain transformers, and below a KL."""

import numpy as np
import pytest
import torch
from export_sources import dequantized, open_source
from models import save_tiny, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.conversion.gguf import export_gguf
from lowbit.conversion.mlx import export_mlx
from lowbit.eval import evaluate
from lowbit.generation.stream import load_tokenizer
from lowbit.text.datasets import token_stream

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = {"dataset": IDS, "num_samples": 4, "seqlen": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    return save_tiny(folder, dtype=torch.bfloat16, hidden_size=128, intermediate_size=256, **heads)


def chosen(source, folder, bits, engine):
    """A folder whose parts have several schemes."""
    report = lowbit.quantize(source, folder, bits=bits, engine=engine, **QUICK)
    assert len({unit["scheme"] for unit in report.allocation["units"]}) > 1
    return open_source(folder)


def test_gguf_holds_it_exactly_in_as_many_bytes(source, tmp_path):
    gguf = pytest.importorskip("gguf")
    found = chosen(source, tmp_path / "out", 5.7, "llama.cpp")
    export_gguf(found, tmp_path / "model.gguf")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    types = {tensor.tensor_type.name for tensor in read.values()}
    assert len(types & {"Q4_0", "Q5_0", "Q8_0"}) > 1 and not types & {"Q4_1", "Q5_1"}
    blocks = sum(t.n_bytes for t in read.values() if t.tensor_type.name.startswith("Q"))
    weights = sum(t.n_elements for t in read.values() if t.tensor_type.name.startswith("Q"))
    assert 8 * blocks / weights <= 5.7
    down = read["blk.0.ffn_down.weight"]
    values = gguf.dequantize(down.data, down.tensor_type)
    assert np.array_equal(values, dequantized(found)["model.layers.0.mlp.down_proj.weight"].numpy())


def test_mlx_holds_it_exactly(source, tmp_path):
    """By MLX's own formula, code * scale + bias: tests/interop/test_mlx_lm.py has it from mlx-lm itself."""
    found = chosen(source, tmp_path / "out", 5.3, "mlx")
    export_mlx(found, tmp_path / "mlx")
    tensors, expected = load_file(tmp_path / "mlx" / "model.safetensors"), dequantized(found)
    for name in (f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("down", "gate")):
        words, scales, biases = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        rows, columns = expected[f"{name}.weight"].shape
        bits = 32 * words.shape[1] // columns
        stream = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, bitorder="little").reshape(rows, columns, bits)
        codes = torch.from_numpy(stream.astype(np.int64) @ (1 << np.arange(bits))).view(rows, scales.shape[1], -1)
        weight = codes * scales.float()[..., None] + biases.float()[..., None]
        assert torch.equal(weight.view(rows, columns), expected[f"{name}.weight"])


def test_transformers_computes_the_same_logits_of_five_and_six_bits(source, tmp_path):
    chosen(source, tmp_path / "out", 5.7, "transformers")
    ids = token_ids()
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "out", dtype=torch.float32)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-4)


def test_a_limit_on_the_kl_holds_on_text_that_was_not_used(tmp_path):
    """The embedded model, on modules of the standard library that it was neither trained nor calibrated on."""
    data = {"dataset": "stdlib-train", "num_samples": 8, "seqlen": 256}
    report = lowbit.quantize("reference", tmp_path / "out", max_kl=0.03, **data)
    assert report.bits_per_weight < 4.2  # and not by spending all there is
    stream = token_stream(load_tokenizer("reference"), "stdlib", 4096)
    models = [lowbit.load(folder, dtype="float32") for folder in (tmp_path / "out", "reference")]
    assert evaluate(models[0], stream, reference=models[1], seqlen=256).kl_mean <= 0.03
