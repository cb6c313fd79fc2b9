"""GGUF files that the gguf package wrote, as models: packed and decoded, quantized again, converted, damaged."""

import logging
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read_json, stored_tensors
from models import relative_error, token_ids

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError, UsageError
from lowbit.folders import gguf as opening
from lowbit.folders.locate import resolve
from lowbit.layers.experts import expert_weights
from lowbit.layers.linear import LowbitLinear

gguf = pytest.importorskip("gguf")

from gguf_files import ARCHITECTURES, SIZES, theirs, write_gguf  # noqa: E402
from models import tiny_model  # noqa: E402

# Products of integers summed in float32, against products of the decoded weights in float32
FLOAT32 = 3e-6
DENSE = [name for name in ARCHITECTURES if name != "gpt2"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "gguf"


def of_kind(kind: str):
    return lambda name: kind


def packed_modules(model) -> dict[str, str]:
    """Name -> scheme of all that runs in integers."""
    found = {name: m.scheme.name for name, m in model.named_modules() if isinstance(m, LowbitLinear)}
    for name, module in model.named_modules():
        found |= {f"{name}.{leaf}": weights.scheme.name for leaf, weights in expert_weights(module).items()}
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


# Llama's rows are in another order; of the others one type each
PACKED = [("llama", "Q4_0"), *((name, ("Q8_0", "Q4_0")[place % 2]) for place, name in enumerate(DENSE))]


@pytest.mark.parametrize(("name", "kind"), PACKED)
def test_integers_run_packed(name, kind, tmp_path):
    """Through rows in another order, and experts side by side: the logits of the decoded weights, by transformers."""
    file = write_gguf(tmp_path / "model.gguf", name, of_kind(kind))
    model, expected = lowbit.load(file, dtype=torch.float32), theirs(file)
    schemes = packed_modules(model)
    assert set(schemes.values()) == {"W4A16-G32" if kind == "Q4_0" else "W8A16-G32"}
    linears = [name for name, module in expected.named_modules() if isinstance(module, torch.nn.Linear)]
    dense = {"lm_head"} if expected.config.tie_word_embeddings else set()
    assert {name for name in linears if "gate" not in name.rpartition(".")[2] or "proj" in name} - dense <= set(schemes)
    assert relative_error(logits(model), logits(expected)) < FLOAT32
    state = expected.state_dict()
    for module, layer in model.named_modules():
        if isinstance(layer, LowbitLinear):
            assert layer.backend == "native" or sys.platform != "linux"
            assert torch.equal(layer.dequantize(torch.float32), state[f"{module}.weight"]), module


KINDS = ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ1_M", "F16",
         "BF16", "F32"]  # fmt: skip


def test_other_types_are_decoded(tmp_path):
    """To the bit, in float32 and in bfloat16: each matrix of a model is of another type."""
    kinds = {}

    def kind_of(name: str) -> str:
        return kinds.setdefault(name, KINDS[len(kinds) % len(KINDS)])

    file = write_gguf(tmp_path / "model.gguf", "llama", kind_of)
    assert set(kinds.values()) == {*KINDS}
    for dtype in (torch.float32, torch.bfloat16):
        ours, expected = lowbit.load(file, dtype=dtype).state_dict(), theirs(file, dtype).state_dict()
        assert ours.keys() == expected.keys()
        for name in expected:
            assert torch.equal(ours[name], expected[name]), name
    assert CheckpointReader(resolve(file)).method == "gguf"


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_plain_types_are_no_quantization(kind, tmp_path):
    assert CheckpointReader(resolve(write_gguf(tmp_path / "model.gguf", "llama", of_kind(kind)))).method is None


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "gpt2"])
def test_other_rules_apply_to_what_is_decoded(name, tmp_path):
    changes = {"max_position_embeddings": 1024} if name == "gpt2" else SIZES
    file = write_gguf(tmp_path / "model.gguf", name, of_kind("Q4_1"), model=tiny_model(name, **changes))
    ours, expected = lowbit.load(file, dtype=torch.float32).state_dict(), theirs(file).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


MIXED = {"ffn_down": "Q6_K", "attn_v": "Q8_0", "token_embd": "Q6_K", "output.": "Q6_K", "ffn_gate": "Q4_1"}


def mixed(name: str) -> str:
    """Of several types, as llama.cpp's recipes are."""
    return next((kind for part, kind in MIXED.items() if part in name), "Q4_0")


def test_integers_run_packed_on_gpu_kernels(tmp_path, monkeypatch):
    """In triton's interpreter, in float16: the scales are what the file has."""
    from lowbit.backends import triton

    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "INTERPRETED", True)
    small = tiny_model("llama", **SIZES | {"hidden_size": 128, "intermediate_size": 128}, num_hidden_layers=1)
    kinds = lambda name: "Q8_0" if "attn" in name else "Q4_0"  # noqa: E731
    file = write_gguf(tmp_path / "model.gguf", "llama", kinds, model=small)
    model = lowbit.load(file, dtype=torch.float16, backend="triton", fuse=False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowbitLinear)}
    assert {layer.backend for layer in layers.values()} == {"triton"} and len(layers) == 8
    expected, ids = theirs(file), token_ids(2)
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected(ids).logits) < 5e-3
    state = expected.state_dict()
    assert all(torch.equal(layer.dequantize(torch.float32), state[f"{name}.weight"]) for name, layer in layers.items())


SOURCES = [("llama", mixed), ("qwen3_moe", of_kind("Q8_0"))]


@pytest.mark.parametrize(("name", "kinds"), SOURCES)
def test_quantize_verify_load(name, kinds, tmp_path, caplog):
    model = tiny_model(name, **SIZES, num_hidden_layers=1)
    file = write_gguf(tmp_path / "model.gguf", name, kinds, model=model)
    plain, made = tmp_path / "plain", tmp_path / "made"
    done = lowbit.dequantize(file, plain)
    assert done.source_format.startswith("gguf") and done.source_bytes < done.output_bytes
    wanted = logits(theirs(file))
    # rounded to bfloat16 and float16
    assert relative_error(logits(lowbit.load(plain, dtype=torch.float32)), wanted) < 0.01
    report = lowbit.quantize(file, made, scheme="W8A16-G32")
    assert [record.message for record in caplog.records].count(
        f"{file} is quantized already (gguf): the error of that stays"
    ) == 1  # fmt: skip
    assert lowbit.verify(made, reference=file).ok
    assert relative_error(logits(lowbit.load(made, dtype=torch.float32)), wanted) < 0.05
    preview = lowbit.plan(file, scheme="W8A16-G32")
    assert preview.output_bytes == report.output_bytes and preview.source_bytes == report.source_bytes
    assert report.source == str(file) and read_json(made / "config.json")["architectures"]


def test_integers_on_the_grid_that_is_asked_for_are_kept(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", "llama", of_kind("Q4_0"))
    report = lowbit.quantize(file, tmp_path / "made", scheme="W4A16-G32")
    assert report.mean_error == 0
    source = CheckpointReader(resolve(file))
    made = stored_tensors(tmp_path / "made")
    for name in [name for name in made if name.endswith(("_packed", "_scale"))]:
        assert torch.equal(made[name], source.tensor(name)), name


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_convert_writes_the_same_integers(format, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", "llama", of_kind("Q4_0"))
    done = lowbit.convert(file, tmp_path / "made", format=format)
    assert (done.source_format, done.format, done.weights) == ("gguf", format, 15)
    assert lowbit.verify(tmp_path / "made").ok
    made = lowbit.load(tmp_path / "made", dtype=torch.float32)
    state = theirs(file).state_dict()
    for name, layer in made.named_modules():
        if isinstance(layer, LowbitLinear):
            assert torch.equal(layer.dequantize(torch.float32), state[f"{name}.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_gguf_and_back(name, tmp_path):
    """Our own export, opened: the same integers, and the same config."""
    lowbit.quantize(dense(tmp_path, name), tmp_path / "first", scheme="W4A16-G32")
    lowbit.convert(tmp_path / "first", tmp_path / "model.gguf", format="gguf")
    lowbit.convert(tmp_path / "model.gguf", tmp_path / "again", format="compressed-tensors")
    first, again = stored_tensors(tmp_path / "first"), stored_tensors(tmp_path / "again")
    for key in [key for key in first if key.endswith("_packed")]:
        assert torch.equal(first[key], again[key]), key
        scale = key.replace("_packed", "_scale")
        assert torch.equal(first[scale].float(), again[scale].float()), scale
    before, after = (read_json(tmp_path / folder / "config.json") for folder in ("first", "again"))
    kept = {
        "head_dim",
        "rope_parameters",
        "num_key_value_heads",
        "moe_intermediate_size",
        "eos_token_id",
    } & after.keys()
    assert {key: before[key] for key in kept} == {key: after[key] for key in kept}
    assert before["architectures"] == after["architectures"]


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def dense(tmp_path, name: str) -> Path:
    changes = {"rope_parameters": LLAMA3} if name == "llama" else {}
    tiny_model(name, torch.bfloat16, **SIZES, **changes).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_split_files(tmp_path):
    def split(part: int):
        def change(tensors):
            for number, name in enumerate(list(tensors)):
                if number % 2 != part:
                    del tensors[name]

        return change

    whole = write_gguf(tmp_path / "whole.gguf", "llama", of_kind("Q4_0"))
    for part in (0, 1):
        write_gguf(tmp_path / f"model-0000{part + 1}-of-00002.gguf", "llama", of_kind("Q4_0"), change=split(part))
    expected = logits(lowbit.load(whole))
    for part in (1, 2):
        assert torch.equal(logits(lowbit.load(tmp_path / f"model-0000{part}-of-00002.gguf")), expected)
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.gguf is missing: model-00001"):
        lowbit.load(tmp_path / "model-00001-of-00002.gguf")


def test_a_calibrated_run_takes_them_too(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", "llama", mixed, model=tiny_model("llama", **SIZES, num_hidden_layers=1))
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    lowbit.quantize(file, tmp_path / "made", scheme="W4A16-G32", method="gptq", dataset=ids)
    assert lowbit.verify(tmp_path / "made", reference=file).ok


def test_a_folder_is_made_once_and_anew_for_another_file(tmp_path, cache):
    file = write_gguf(tmp_path / "model.gguf", "llama", of_kind("Q4_0"))
    first = resolve(file)
    assert resolve(file) == first and first.parent == cache
    assert not any(path.suffix == ".safetensors" for path in first.iterdir())
    write_gguf(file, "llama", of_kind("Q8_0"))
    assert resolve(file) != first
    assert packed_modules(lowbit.load(file)).popitem()[1] == "W8A16-G32"


def test_what_is_written_is_not_the_source(tmp_path):
    file = write_gguf(tmp_path / "model" / "model.gguf" if (tmp_path / "model").mkdir() is None else None)
    with pytest.raises(lowbit.errors.OutputError, match="overlap"):
        lowbit.quantize(file, tmp_path / "model", overwrite=True)


def test_of_the_hub(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", "llama", of_kind("Q4_0"))
    expected = logits(lowbit.load(file))
    asked = []

    def download(repository, name, revision=None, **hub):
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert torch.equal(logits(lowbit.load("org/tiny:model.gguf", revision="main")), expected)
    assert asked == [("org/tiny", "model.gguf", "main")]
    assert lowbit.plan("org/tiny:model.gguf", scheme="W4A16-G32").source == "org/tiny:model.gguf"


# --- what is refused ---


def refused(tmp_path, match: str, name="llama", kind="Q4_0", use=lowbit.load, **how) -> None:
    file = write_gguf(tmp_path / "model.gguf", name, of_kind(kind), **how)
    with pytest.raises(InputError, match=match) as error:
        use(file)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/gguf/.*"))  # nothing half made


def without(*names: str):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def with_nan(name: str, offset: int):
    def change(tensors):
        data, kind = tensors[name]
        data = np.ascontiguousarray(data).copy()
        struct.pack_into("<H", data.view(np.uint8).reshape(-1), offset, 0x7E00)
        tensors[name] = data, kind

    return change


def test_missing_tensors_are_named(tmp_path):
    refused(tmp_path, r"blk\.1\.ffn_up\.weight, which model\.layers\.1\.mlp\.up_proj\.weight is made of, is not in",
            change=without("blk.1.ffn_up.weight"))  # fmt: skip
    refused(tmp_path, r"blk\.0\.ffn_up_exps\.weight.* cannot be model\.layers\.0\.mlp\.experts\.gate_up_proj|gate_exps",
            "qwen3_moe", change=without("blk.0.ffn_gate_exps.weight"))  # fmt: skip


@pytest.mark.parametrize("use", [lowbit.load, lambda file: lowbit.quantize(file, file.parent / "made"),
                                 lambda file: lowbit.convert(file, file.parent / "made", format="gptq")])  # fmt: skip
def test_nan_scales_are_named(use, tmp_path):
    refused(tmp_path, r"model\.layers\.0\.mlp\.down_proj\.weight_scale in model\.gguf holds 1 NaN", use=use,
            change=with_nan("blk.0.ffn_down.weight", 18 * 5))  # fmt: skip
    assert not (tmp_path / "made").exists()


def test_nan_in_decoded_weights_is_named(tmp_path):
    refused(tmp_path, r"model\.layers\.0\.mlp\.down_proj\.weight in model\.gguf holds 256 NaN", kind="Q6_K",
            change=with_nan("blk.0.ffn_down.weight", 208))  # fmt: skip


def test_other_shapes_than_the_config_are_refused(tmp_path):
    def change(tensors):
        data, kind = tensors["blk.0.attn_k.weight"]
        tensors["blk.0.attn_k.weight"] = data[:64], kind

    refused(tmp_path, r"attn_k\.weight \[64, 256\] in model\.gguf cannot be .*k_proj\.weight, which is \[128, 256\]",
            change=change)  # fmt: skip


def test_more_layers_than_tensors_are_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    data = bytearray(file.read_bytes())
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    struct.pack_into("<I", data, at, 4_000_000_000)
    file.write_bytes(data)
    with pytest.raises(InputError, match="says that it has 4000000000 layers, and holds 21 tensors"):
        lowbit.load(file)


def test_what_no_format_holds_is_not_converted(tmp_path):
    refused(tmp_path, r"q_proj\.weight of .*model\.gguf is stored in gguf as Q6_K, which no format here holds",
            kind="Q6_K", use=lambda file: lowbit.convert(file, tmp_path / "made", format="gptq"))  # fmt: skip


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"need the gguf package: pip install 'lowbit\[gguf\]'"):
        lowbit.load(file)


def test_tensors_that_transformers_does_not_use_are_named(tmp_path, caplog):
    def change(tensors):
        tensors["blk.0.extra.weight"] = np.ones((4, 4), np.float32), gguf.GGMLQuantizationType.F32

    file = write_gguf(tmp_path / "model.gguf", change=change)
    with caplog.at_level(logging.WARNING):
        lowbit.load(file)
    assert "blk.0.extra.weight of model.gguf is left out: transformers has no use for it" in caplog.text
    report = lowbit.quantize(file, tmp_path / "made", scheme="W4A16-G32", unclaimed="quantize")
    assert report.unclaimed == {"blk.0.extra.weight": "left out: transformers has no name for it"}
    assert lowbit.plan(file, scheme="W4A16-G32").unclaimed == report.unclaimed


def test_rotary_factors_of_no_rule_are_refused(tmp_path):
    def change(tensors):
        factors = np.linspace(1, 5, 32, dtype=np.float32)
        tensors["rope_freqs.weight"] = factors, gguf.GGMLQuantizationType.F32

    refused(tmp_path, r"model\.gguf: rope_freqs\.weight scales its rotary positions in another way", change=change)
