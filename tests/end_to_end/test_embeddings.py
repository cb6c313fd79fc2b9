"""Quantized input embeddings: what is written, what the other side makes of it, and what of theirs runs here."""

import json
import subprocess
import sys

import pytest
import torch
from models import relative_error, save_tiny, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import LowbitConfig
from lowbit.discovery.sites import embedding_of
from lowbit.errors import InputError, UsageError
from lowbit.layers.embedding import QuantizedEmbedding
from lowbit.layers.linear import LowbitLinear
from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.numerics.scheme import Scheme
from lowbit.verification.checks import static_checks


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# Gemma scales the rows, GPT-2 has another embedding beside, and both are tied to their heads
@pytest.mark.parametrize(
    ("name", "embeddings"),
    [
        ("llama", "W8A16-G32"), ("qwen3", "W4A16_ASYM-G32"), ("gemma3", "W3A16-CHANNEL"), ("gemma3", "W8A16_ASYM-G32"),
        ("gpt2", "W4A16-G32"), ("gpt_neox", "W8A16-CHANNEL"), ("mixtral", "W2A16_ASYM-G16"),
    ],
)  # fmt: skip
def test_quantized_embeddings_run_as_their_decoded_weights(name, embeddings, tmp_path):
    source, folder = save_tiny(tmp_path / "dense", name), tmp_path / "quantized"
    lowbit.quantize(source, folder, scheme="W4A16-G32", embeddings=embeddings)
    model = lowbit.load(folder)
    assert isinstance(embedding_of(model), QuantizedEmbedding)
    tied = config_of(source)["tie_word_embeddings"]
    assert isinstance(model.get_output_embeddings(), LowbitLinear) == tied
    assert [check for check in static_checks(folder, source) if check.ok is False] == []
    # its rows are those of the source, rounded, and all else runs as before
    lowbit.dequantize(folder, tmp_path / "plain")
    plain = lowbit.load(tmp_path / "plain")
    rounded = dequantize(quantize_nearest(embedding_of(lowbit.load(source)).weight.detach(), Scheme.parse(embeddings)))
    assert torch.equal(embedding_of(plain).weight, rounded) and torch.equal(embedding_of(model).weight, rounded)
    assert relative_error(logits(model), logits(plain)) < 1e-5
    # saved, it is the same again
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["quantization_config"] == config_of(folder)["quantization_config"]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    # and dequantized, a plain model again
    assert type(embedding_of(model.dequantize())) is type(embedding_of(plain))
    assert relative_error(logits(model), logits(plain)) < 1e-5


def test_config_names_the_class_as_llm_compressor_does(tmp_path):
    """vLLM gives the embeddings of Llama no name, so that no name would find them. Others stay dense by name."""
    lowbit.quantize(save_tiny(tmp_path / "dense", "gpt2"), tmp_path / "q", group_size=32, embeddings="W8A16-G32")
    said = config_of(tmp_path / "q")["quantization_config"]
    assert [group["targets"] for group in said["config_groups"].values()] == [["Linear"], ["Embedding", "lm_head"]]
    assert said["ignore"] == ["transformer.wpe"]
    assert config_of(tmp_path / "q")["tie_word_embeddings"] is False


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_quantized_while_they_are_loaded(name, tied, tmp_path):
    """The same tensors and the same config as of a folder that was quantized."""
    source = save_tiny(tmp_path / "dense", name, tie_word_embeddings=tied)
    lowbit.quantize(source, tmp_path / "q", scheme="W4A16-G32", embeddings="W8A16-G32")
    config = LowbitConfig(bits=4, group_size=32, embeddings="W8A16-G32")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert isinstance(embedding_of(model), QuantizedEmbedding)
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("q", "saved"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    said, saved = (config_of(tmp_path / folder) for folder in ("q", "saved"))
    assert said["quantization_config"] == saved["quantization_config"]
    assert said["tie_word_embeddings"] is saved["tie_word_embeddings"] is False
    assert relative_error(logits(model), logits(lowbit.load(tmp_path / "saved"))) < 1e-6


def test_head_of_a_tied_model_gets_its_own_scheme(tmp_path):
    source = save_tiny(tmp_path / "dense", tie_word_embeddings=True)
    asked = {"group_size": 32, "embeddings": "W4A16-G32", "lm_head": "W8A16-G32"}
    planned = lowbit.plan(source, **asked)
    report = lowbit.quantize(source, tmp_path / "q", **asked)
    model = lowbit.load(tmp_path / "q")
    assert (model.model.embed_tokens.scheme, model.lm_head.scheme) == (Scheme(4, 32), Scheme(8, 32))
    by_default = lowbit.plan(source, group_size=32, embeddings="W4A16_ASYM-G32").modules
    assert next(module["scheme"] for module in by_default if module["name"] == "lm_head") == "W8A16-G32"
    assert planned.output_bytes == report.output_bytes
    assert planned.file_bytes == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert planned.source_bytes == sum(t.nbytes for t in load_file(source / "model.safetensors").values())


def test_calibrated_runs_quantize_embeddings_without_data(tmp_path):
    source = save_tiny(tmp_path / "dense", tie_word_embeddings=True)
    ids = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    lowbit.quantize(
        source, tmp_path / "q", group_size=32, method="gptq", dataset=ids, num_samples=4, seqlen=32,
        embeddings="W8A16-G32",
    )  # fmt: skip
    stored, dense = load_file(tmp_path / "q" / "model.safetensors"), load_file(source / "model.safetensors")
    table = lowbit.load(tmp_path / "q").model.embed_tokens.dequantize()
    nearest = quantize_nearest(dense["model.embed_tokens.weight"], Scheme(8, 32), "mse")
    assert torch.equal(table, dequantize(nearest))
    # the head saw data
    assert not torch.equal(stored["lm_head.weight_packed"], stored["model.embed_tokens.weight_packed"])
    assert [check for check in static_checks(tmp_path / "q", source) if check.ok is False] == []
    # quantized again, the table is that of the first run
    lowbit.quantize(
        tmp_path / "q", tmp_path / "again", scheme="W8A16-G32", method="gptq", dataset=ids, num_samples=4, seqlen=32,
        embeddings="W8A16-G32",
    )  # fmt: skip
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(again["model.embed_tokens.weight_packed"], stored["model.embed_tokens.weight_packed"])


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_formats_without_embeddings_refuse_them(format, tmp_path):
    source = save_tiny(tmp_path / "dense")
    with pytest.raises(UsageError, match=f"{format} has no quantized embeddings: leave --embeddings out"):
        lowbit.quantize(source, tmp_path / "q", group_size=32, embeddings="W4A16-G32", format=format)
    lowbit.quantize(source, tmp_path / "ct", group_size=32, embeddings="W4A16-G32")
    with pytest.raises(InputError, match=f"model.embed_tokens cannot be stored as {format}: it is an embedding"):
        lowbit.convert(tmp_path / "ct", tmp_path / "q", format=format)
    assert not (tmp_path / "q").exists()


def test_embeddings_that_cannot_be_quantized_are_refused(tmp_path):
    with pytest.raises(UsageError, match="embeddings is W8A8-CHANNEL; expected W<bits>A16"):
        lowbit.quantize(save_tiny(tmp_path / "dense"), tmp_path / "q", embeddings="W8A8")
    from transformers import AutoModelForSeq2SeqLM, T5Config

    t5 = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match=r"shared.weight is tied to \w+.embed_tokens.weight, which needs it dense"):
        lowbit.quantize(tmp_path / "t5", tmp_path / "q", group_size=32, embeddings="W8A16-G32")
    assert not (tmp_path / "q").exists()


def test_damaged_tables_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    lowbit.quantize(save_tiny(tmp_path / "dense"), tmp_path / "q", group_size=32, embeddings="W8A16-G32")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    damages = {
        r"model.embed_tokens.weight_scale is not in the checkpoint": {"model.embed_tokens.weight_scale": None},
        r"model.embed_tokens.weight_scale holds NaN": {
            "model.embed_tokens.weight_scale": torch.full((128, 2), torch.nan)
        },
        r"model.embed_tokens.weight_packed has shape \[128, 15\]": {
            "model.embed_tokens.weight_packed": torch.zeros(128, 15, dtype=torch.int32)
        },
    }
    for message, changes in damages.items():
        kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(kept, tmp_path / "q" / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=message):
            lowbit.load(tmp_path / "q")


# In a process without lowbit. Plain transformers with compressed-tensors; and compressed-tensors' own code, which reads
# several schemes: transformers 5.24 fails to initialise, before that, an embedding without a dense weight
_THEIRS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

def plain_transformers(folder):
    loading = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, quantization_config=loading)
    assert not any(info.values()), info
    return model

def compressed_tensors(folder):
    config = AutoConfig.from_pretrained(folder)
    said = dict(config.quantization_config)
    said.pop("quant_method")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    quantization = QuantizationConfig.model_validate(said)
    apply_quantization_config(model, quantization)
    ModelCompressor(quantization_config=quantization).compress_model(model)
    missing, unexpected = model.load_state_dict(load_file(folder + "/model.safetensors"), strict=False)
    # of Gemma: compressing a module makes its computed buffers look like stored ones
    assert not unexpected and all(name.endswith(".embed_scale") for name in missing), (missing, unexpected)
    return model

ids, made = torch.load("ids.pt", weights_only=True), {}
for folder, reader in json.loads(sys.argv[1]):
    with torch.no_grad():
        made[folder] = globals()[reader](folder)(ids).logits
assert "lowbit" not in sys.modules
torch.save(made, "logits.pt")
"""
# (architecture, scheme of the linears, of the input embedding, who reads it), each with a tied head and without
_READ = [
    ("llama", "W8A16-G32", "W8A16-G32", "plain_transformers"),
    ("gemma3", "W8A16-G32", "W8A16-G32", "plain_transformers"),
    ("llama", "W4A16-G64", "W8A16-G32", "compressed_tensors"),
    ("gemma3", "W4A16-G64", "W4A16_ASYM-G32", "compressed_tensors"),
]


@pytest.mark.slow
def test_transformers_and_compressed_tensors_agree(tmp_path):
    """One process reads them all: starting it takes longer than all else."""
    jobs = []
    for number, (name, scheme, embeddings, reader) in enumerate(_READ):
        for tied in (True, False):
            source, folder = tmp_path / f"dense {number}{tied}", tmp_path / f"q{number}{tied}"
            save_tiny(source, name, tie_word_embeddings=tied)
            lowbit.quantize(source, folder, scheme=scheme, embeddings=embeddings)
            jobs.append((str(folder), reader))
    torch.save(token_ids(), tmp_path / "ids.pt")
    command = [sys.executable, "-c", _THEIRS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert len(theirs) == 8
    for folder, expected in theirs.items():
        assert relative_error(logits(lowbit.load(folder)), expected) < 1e-5, folder


def saved_by_llm_compressor(folder, *, tied: bool, head: bool, bits: int, group: int | None, sym: bool):
    """What llm-compressor does to embeddings, with the package that it does it with: untied, quantized by class, and
    tied again where both tables came out the same. Returns the logits of the rounded model."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_model(tie_word_embeddings=tied)
    for module in (model.get_input_embeddings(), model.lm_head):
        module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    weights = {
        "num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group" if group else "channel",
        "group_size": group,
    }  # fmt: skip
    groups = {"embedding": {"targets": ["Embedding", *(["re:.*lm_head$"] if head else [])], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            grouped = module.weight.detach().unflatten(1, (-1, group or module.weight.shape[1]))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            if not sym:
                module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
    expected = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    if tied and head:
        for name in [*dict(model.lm_head.named_parameters()), *dict(model.lm_head.named_buffers())]:
            setattr(model.lm_head, name, getattr(model.model.embed_tokens, name))
        model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return expected


@pytest.mark.parametrize(("tied", "head"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 32, True), (8, None, True), (4, None, False), (2, 32, False)])
def test_lowbit_runs_what_llm_compressor_writes(bits, group, sym, tied, head, tmp_path):
    expected = saved_by_llm_compressor(tmp_path / "theirs", tied=tied, head=head, bits=bits, group=group, sym=sym)
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert "model.embed_tokens.weight_packed" in stored
    once = tied and head
    assert once == (not any(name.startswith("lm_head") for name in stored))
    model = lowbit.load(tmp_path / "theirs")
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, LowbitLinear) == head
    assert relative_error(logits(model), expected) < 1e-5
    assert [check for check in static_checks(tmp_path / "theirs", max_unquantized=1.0) if check.ok is False] == []
    # what is saved has a head of its own
    model.save_pretrained(tmp_path / "saved")
    assert relative_error(logits(lowbit.load(tmp_path / "saved")), expected) < 1e-5
    # plain again, the head of a table that is stored once is tied as it was
    lowbit.dequantize(tmp_path / "theirs", tmp_path / "plain")
    assert config_of(tmp_path / "plain")["tie_word_embeddings"] is once
    assert relative_error(logits(lowbit.load(tmp_path / "plain")), expected) < 1e-5
