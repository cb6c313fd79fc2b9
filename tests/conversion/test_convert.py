"""Conversions are exact or refused; dequantized models are those of the codes."""

import re

import pytest
import torch
from folders import contents, edit_config, edit_tensors, read_json, save_chat_model, stored_tensors
from models import relative_error, save_tiny, token_ids
from transformers import AutoModelForCausalLM
from weights import KERNEL_BITS

import lowbit
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.formats import get_format
from lowbit.numerics.scheme import Scheme

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), intermediate_size=128, dtype=torch.bfloat16)


@pytest.fixture
def quantize(dense, tmp_path):
    def run(scheme, format="compressed-tensors", name="q", source=None, **options):
        lowbit.quantize(source or dense, tmp_path / name, scheme=scheme, format=format, **options)
        return tmp_path / name

    return run


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def assert_same_tensors(first, second):
    first, second = stored_tensors(first), stored_tensors(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


TRIPS = [
    pytest.param(scheme, ("gptq", "awq") if scheme.bits == 4 else ("gptq",), id=scheme.name)
    for scheme in (Scheme(bits, group, sym) for bits in KERNEL_BITS for group in (32, -1) for sym in (True, False))
]


@pytest.mark.parametrize("scheme, formats", TRIPS)
def test_round_trip(scheme, formats, quantize, tmp_path):
    """compressed-tensors -> ... -> compressed-tensors gives every tensor back, and each stop is what quantizing to that
    format writes."""
    source = folder = quantize(scheme)
    for format in formats:
        done = lowbit.convert(folder, tmp_path / format, format=format)
        assert (done.format, done.weights) == (format, 14)
        folder = tmp_path / format
        direct = quantize(scheme, format, name=f"direct-{format}")
        assert_same_tensors(folder, direct)
        assert read_json(folder / "config.json") == read_json(direct / "config.json")
        assert (folder / "quantize_config.json").exists() == (format == "gptq")
    lowbit.convert(folder, tmp_path / "back", format="compressed-tensors")
    assert_same_tensors(tmp_path / "back", source)
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json")
    assert not (tmp_path / "back" / "quantize_config.json").exists()


@pytest.mark.parametrize("name", ("qwen3_moe", "gpt2"))
def test_experts_and_transposed_weights(name, quantize, tmp_path):
    dense = save_tiny(tmp_path / "dense", name)
    source = quantize(Scheme(4, 32, False), source=dense)
    expected = logits(lowbit.load(source))
    for format in ("gptq", "awq"):
        lowbit.convert(source, tmp_path / format, format=format)
        assert torch.equal(logits(lowbit.load(tmp_path / format)), expected)
        lowbit.dequantize(tmp_path / format, tmp_path / f"{format}-dense")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{format}-dense")
        assert relative_error(logits(plain), expected) < 1e-5
        assert stored_tensors(tmp_path / f"{format}-dense").keys() == stored_tensors(dense).keys()


def test_mixed_schemes(quantize, tmp_path):
    """Exceptions and what is left alone go along by name."""
    overrides = [(".*down_proj", Scheme(8, 64))]
    source = quantize(Scheme(4, 32), overrides=overrides, ignore=[r".*layers\.1\.mlp\.gate_proj"])
    lowbit.convert(source, tmp_path / "gptq", format="gptq")
    lowbit.convert(tmp_path / "gptq", tmp_path / "back", format="compressed-tensors")
    assert_same_tensors(tmp_path / "back", source)
    assert torch.equal(logits(lowbit.load(tmp_path / "gptq")), logits(lowbit.load(source)))
    with pytest.raises(InputError, match="down_proj cannot be stored as awq: awq has 4 bits, not 8"):
        lowbit.convert(source, tmp_path / "awq", format="awq")
    assert not (tmp_path / "awq").exists()


def test_shards_and_side_files(tmp_path, quantize):
    source = quantize(Scheme(4, 32), source=save_chat_model(tmp_path / "dense"))
    lowbit.convert(source, tmp_path / "gptq", format="gptq", max_shard_size="50kB")
    assert len(list((tmp_path / "gptq").glob("model-*.safetensors"))) > 2
    for side in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "gptq" / side).read_bytes() == (source / side).read_bytes()
    lowbit.convert(tmp_path / "gptq", tmp_path / "back", format="compressed-tensors")
    assert_same_tensors(tmp_path / "back", source)


def shuffle(folder):
    g_idx = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int() // 32
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.g_idx"].copy_(g_idx))
    return folder


def test_act_order(quantize, tmp_path):
    source = shuffle(quantize(Scheme(4, 32), "gptq"))
    for format in ("compressed-tensors", "awq"):
        with pytest.raises(InputError, match=rf"{re.escape(UP)} cannot be stored as {format}: .*act-order"):
            lowbit.convert(source, tmp_path / "no", format=format)
    lowbit.convert(source, tmp_path / "again", format="gptq")
    assert_same_tensors(source, tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["quantization_config"]["desc_act"] is True
    lowbit.dequantize(source, tmp_path / "dense", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert relative_error(logits(lowbit.load(source, dtype=torch.float32)), logits(plain)) < 1e-5


def test_output_that_reads_back_differently_is_removed(quantize, tmp_path, monkeypatch):
    fmt = get_format("gptq")
    pack = fmt.pack

    def wrong(qweight):
        tensors = pack(qweight)
        if tensors["qweight"].device.type != "meta":
            tensors["qweight"][0, 0] ^= 1
        return tensors

    source = quantize(Scheme(4, 32))
    monkeypatch.setattr(fmt, "pack", wrong)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="the codes read back from the output differ"):
        lowbit.convert(source, tmp_path / "gptq", format="gptq")
    assert contents(tmp_path) == before


def test_dequantized_values_and_dtypes(quantize, tmp_path):
    """Every weight is (code - zero) * scale, rounded once; all other tensors are those of the source."""
    source = quantize(Scheme(3, 32, False))
    expected = lowbit.load(source).dequantize().state_dict()
    lowbit.dequantize(source, tmp_path / "as-stored")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "as-stored", dtype="auto").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    lowbit.dequantize(source, tmp_path / "fp32", dtype="float32")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "fp32").values()} == {torch.float32}
    config = read_json(tmp_path / "fp32" / "config.json")
    assert config["dtype"] == "float32" and "quantization_config" not in config


def test_overflow_is_named(quantize, tmp_path):
    source = quantize(Scheme(4, 32))
    edit_tensors(source, lambda tensors: tensors[f"{UP}.weight_scale"].fill_(3e4))
    with pytest.raises(InputError, match=rf"{re.escape(UP)}\.weight has values of .*, too large for torch.float16"):
        lowbit.dequantize(source, tmp_path / "fp16", dtype="float16")
    assert not (tmp_path / "fp16").exists()


def test_exits(quantize, tmp_path):
    """By way of the same function; what they hold is proved in test_export_mlx and test_export_gguf."""
    source = quantize(Scheme(4, 32))
    done = lowbit.convert(source, tmp_path / "mlx", format="mlx")
    assert done.weights == 14 and read_json(tmp_path / "mlx" / "config.json")["quantization"]["bits"] == 4
    assert done.output_bytes == (tmp_path / "mlx" / "model.safetensors").stat().st_size
    lowbit.convert(source, tmp_path / "x.gguf", format="gguf")
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"
    done = lowbit.convert(source, tmp_path / "folder", format="gguf")
    assert done.output == str(tmp_path / "folder" / "q.gguf")
    assert done.output_bytes == (tmp_path / "folder" / "q.gguf").stat().st_size
    with pytest.raises(InputError, match="groups"):
        lowbit.convert(quantize(Scheme(4, 16), name="g16"), tmp_path / "y", format="mlx")
    assert not (tmp_path / "y").exists()


def test_fused_experts_are_refused(quantize, tmp_path):
    source = quantize(Scheme(4, 32), source=save_tiny(tmp_path / "dense", "gpt_oss"))
    with pytest.raises(InputError, match="its experts are stored as one tensor, which gptq cannot hold"):
        lowbit.convert(source, tmp_path / "gptq", format="gptq")
    expected = logits(lowbit.load(source).dequantize())
    lowbit.dequantize(source, tmp_path / "plain")
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), expected) < 1e-6


def test_wrong_input(dense, quantize, tmp_path):
    with pytest.raises(UsageError, match="format 'ggml' is not known"):
        lowbit.convert(dense, tmp_path / "x", format="ggml")
    with pytest.raises(InputError, match="holds no quantized weights"):
        lowbit.convert(dense, tmp_path / "x", format="gptq")
    with pytest.raises(UsageError, match="dtype is 'int8'; allowed: bfloat16, float16, float32"):
        lowbit.dequantize(dense, tmp_path / "x", dtype="int8")
    source = quantize(Scheme(4, 32))
    with pytest.raises(OutputError, match="overlap"):
        lowbit.convert(source, source, format="gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="exists already"):
        lowbit.convert(source, tmp_path / "full", format="gptq")
    edit_config(source, architectures=["NoSuchModel"], model_type="nosuch")
    with pytest.raises(InputError, match="cannot read"):
        lowbit.convert(source, tmp_path / "x", format="gptq")
    assert not (tmp_path / "x").exists()
