"""The MLX folder without mlx: names, shapes, settings, refusals. mlx-lm itself: tests/interop/test_mlx_lm.py."""

import json
from dataclasses import replace

import pytest
import torch
from export_sources import dequantized, quantized_source
from folders import contents, edit_config, save_tokenizer, stored_tensors
from safetensors import safe_open

from lowbit.conversion.mlx import export_mlx
from lowbit.errors import InputError, OutputError
from lowbit.formats.bitpack import unpack
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme


def read_weights(folder) -> dict[str, torch.Tensor]:
    """Dense float32 tensors by name in MLX, from the settings in config.json as mlx-lm takes them."""
    tensors = stored_tensors(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    weights = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if f"{module}.scales" not in tensors:
            weights[name] = tensor.float()
        elif suffix == "weight":
            bits, group = (settings.get(module, settings)[key] for key in ("bits", "group_size"))
            scales, biases = (
                tensors[f"{module}.{part}"].float().repeat_interleave(group, -1) for part in ("scales", "biases")
            )
            codes = unpack(tensor.view(torch.int32).flatten(0, -2), bits, scales.shape[-1])
            weights[name] = codes.view(scales.shape) * scales + biases
    return weights


@pytest.mark.parametrize("scheme", ["W4A16-G32", "W3A16_ASYM-G64"])
def test_the_folder_holds_the_same_numbers(scheme, tmp_path):
    source = quantized_source(tmp_path, scheme=scheme, options={"overrides": [(".*o_proj", "W8A16-G128")]})
    save_tokenizer(source.folder)
    seen = []
    notes = export_mlx(source, tmp_path / "mlx", on_plan=lambda plan: lambda entry, note: seen.append(entry))
    assert bool(notes) == ("ASYM" in scheme)
    expected, actual = dequantized(source), read_weights(tmp_path / "mlx")
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert len(seen) == len(expected) and sum(entry.nbytes for entry in seen) > 0
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "quantization_config" not in config
    default = Scheme.parse(scheme)
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (default.bits, default.group_size)
    assert config["quantization"]["model.layers.1.self_attn.o_proj"] == {"group_size": 128, "bits": 8, "mode": "affine"}
    assert (tmp_path / "mlx" / "tokenizer.json").read_bytes() == (source.folder / "tokenizer.json").read_bytes()
    with safe_open(tmp_path / "mlx" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_embeddings_stay_quantized(tmp_path):
    source = quantized_source(tmp_path, options={"embeddings": "W8A16-G64"}, tie_word_embeddings=True)
    export_mlx(source, tmp_path / "mlx")
    expected, actual = dequantized(source), read_weights(tmp_path / "mlx")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    settings = json.loads((tmp_path / "mlx" / "config.json").read_text())
    for name in ("model.embed_tokens", "lm_head"):
        assert settings["quantization"][name] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert settings["tie_word_embeddings"] is False


@pytest.mark.parametrize(("name", "parts"), [("qwen3_moe", ("mlp", "gate_proj", "up_proj", "down_proj")),
                                             ("mixtral", ("block_sparse_moe", "w1", "w3", "w2"))])  # fmt: skip
def test_experts_are_stacked_where_mlx_keeps_them(name, parts, tmp_path):
    source = quantized_source(tmp_path, name, "W4A16-G32")
    export_mlx(source, tmp_path / "mlx", max_shard_size="40KB")
    assert (tmp_path / "mlx" / "model.safetensors.index.json").is_file()
    owner, *projections = parts
    expected, actual = dequantized(source), read_weights(tmp_path / "mlx")
    assert not [key for key in actual if ".experts." in key]
    for layer in range(2):
        for theirs, ours in zip(("gate_proj", "up_proj", "down_proj"), projections, strict=True):
            experts = [expected[f"model.layers.{layer}.{owner}.experts.{e}.{ours}.weight"] for e in range(4)]
            stacked = actual[f"model.layers.{layer}.{owner}.switch_mlp.{theirs}.weight"]
            assert torch.equal(stacked, torch.stack(experts))


def test_dense_experts_are_stacked_too(tmp_path):
    source = quantized_source(tmp_path, "qwen3_moe", options={"ignore": [r".*layers\.0\.mlp\.experts.*"]})
    export_mlx(source, tmp_path / "mlx")
    expected, actual = dequantized(source), read_weights(tmp_path / "mlx")
    experts = [expected[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4)]
    assert torch.equal(actual["model.layers.0.mlp.switch_mlp.up_proj.weight"], torch.stack(experts))


def test_settings_go_by_their_older_names_too(tmp_path):
    source = quantized_source(tmp_path)
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    edit_config(source.folder, rope_parameters=rope)
    export_mlx(source, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["partial_rotary_factor"] == 0.5 and config["rope_parameters"] == rope
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}


def test_groups_that_mlx_does_not_have(tmp_path):
    source = quantized_source(tmp_path, options={"overrides": [(".*1.mlp.up_proj", "W4A16-G16")]})
    with pytest.raises(
        InputError, match=r"layers.1.mlp.up_proj: MLX has groups of 32, 64, 128 inputs only, not W4A16-G16"
    ):
        export_mlx(source, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_biases_that_would_be_rounded_leave_nothing(tmp_path):
    source = quantized_source(tmp_path, scheme="W4A16_ASYM-G32", dtype=torch.float32)
    with pytest.raises(InputError, match=r"^model.layers.0.mlp.down_proj: the bias -zero \* scale .* float32"):
        export_mlx(source, tmp_path / "mlx")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "quantized"}


def test_weights_that_are_stored_transposed(tmp_path):
    source = quantized_source(tmp_path, "gpt2")
    with pytest.raises(InputError, match=r"h.0.attn.c_attn is stored transposed by its model"):
        export_mlx(source, tmp_path / "mlx")


def test_act_order(tmp_path):
    source = quantized_source(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    plain = source.quantized[name]
    scattered = QuantWeight(plain.codes, plain.scales, plain.scheme, None, torch.empty(128, device="meta"))
    with pytest.raises(InputError, match=rf"{name} is in act-order"):
        export_mlx(replace(source, quantized=source.quantized | {name: scattered}), tmp_path / "mlx")


@pytest.mark.parametrize("change", ["scheme", "missing"])
def test_experts_that_do_not_stack(change, tmp_path):
    if change == "scheme":
        odd = {"overrides": [(r".*layers\.0\.mlp\.experts\..*", "W8A16-G32")]}
        source = quantized_source(tmp_path, "qwen3_moe", options=odd)
        first = next(name for name in source.quantized if "layers.0.mlp.experts.2.up" in name)
        other = next(weight for name, weight in source.quantized.items() if "layers.1.mlp.experts.2.up" in name)
        source = replace(source, quantized=source.quantized | {first: other})
        message = r"experts.2.up_proj is W4A16-G32 .* and .*experts.0.up_proj is W8A16-G32 .* so they need one scheme"
    else:
        source = quantized_source(tmp_path, "qwen3_moe")
        left = {name: weight for name, weight in source.quantized.items() if "layers.0.mlp.experts.1.up" not in name}
        source, message = replace(source, quantized=left), r"experts.3.up_proj is one of 3 experts: some are missing"
    with pytest.raises(InputError, match=message):
        export_mlx(source, tmp_path / "mlx")


def test_an_existing_folder_stays(tmp_path):
    source = quantized_source(tmp_path)
    before = contents(tmp_path / "dense")
    with pytest.raises(OutputError, match="exists already"):
        export_mlx(source, tmp_path / "dense")
    assert contents(tmp_path / "dense") == before
    export_mlx(source, tmp_path / "dense", overwrite=True)
    assert "quantization" in json.loads((tmp_path / "dense" / "config.json").read_text())
