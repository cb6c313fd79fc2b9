"""Data-free quantization of a checkpoint: the streamed result is the direct one, the report is what was written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from covering import slow_but
from folders import (
    ROOT,
    contents,
    data_bytes,
    edit_tensors,
    read_json,
    same_bits,
    save_random_llama,
    save_tokenizer,
    stored_tensors,
)
from models import save_tiny, token_ids
from transformers import LlamaForCausalLM

import lowbit
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.formats.compressed_tensors import pack, unpack_weight
from lowbit.numerics.grid import dequantize, quantize_nearest

INDEX = "model.safetensors.index.json"
SCHEMES = {
    "W4A16-G32": ("minmax", torch.float32),
    "W4A16-G16-mse": ("mse", torch.bfloat16),
    "W2A16_ASYM-G32": ("minmax", torch.float16),
    "W3A16_ASYM-CHANNEL": ("minmax", torch.bfloat16),
    "W8A16-CHANNEL": ("mse", torch.float32),
}


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_tensor_is_quantized_as_it_would_be_alone(name, tmp_path):
    search, dtype = SCHEMES[name]
    scheme = lowbit.Scheme.parse(name.removesuffix("-mse"))
    source = save_tiny(tmp_path / "source", dtype=dtype)
    lowbit.quantize(source, tmp_path / "out", scheme=scheme, options={"scale_search": search})
    expected = {}
    for key, tensor in stored_tensors(source).items():
        if is_projection(key):
            packed = pack(quantize_nearest(tensor, scheme, search))
            expected |= {f"{key.removesuffix('.weight')}.{suffix}": part for suffix, part in packed.items()}
        else:
            expected[key] = tensor
    actual = stored_tensors(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(same_bits(actual[key], tensor) for key, tensor in expected.items())


def test_fused_experts_are_quantized_one_by_one(tmp_path):
    source = save_tiny(tmp_path / "source", "gpt_oss")
    scheme = lowbit.Scheme(4, 32)
    report = lowbit.quantize(source, tmp_path / "out", scheme=scheme)
    dense, stored = stored_tensors(source), stored_tensors(tmp_path / "out")
    fused = [name for name, tensor in dense.items() if tensor.ndim == 3]
    assert len(fused) == 4
    for name in fused:
        for expert, matrix in enumerate(dense[name]):
            # gpt_oss keeps [in, out]; a reader expects [out, in]
            packed = pack(quantize_nearest(matrix.T.contiguous(), scheme))
            for suffix, part in packed.items():
                assert same_bits(stored[name + suffix.removeprefix("weight")][expert], part)
    assert {layer["name"] for layer in report.layers} >= set(fused)


@pytest.mark.parametrize("architecture", slow_but(("llama",), ["llama", "mixtral"]))
def test_sharded_in_sharded_out(architecture, tmp_path):
    whole = save_tiny(tmp_path / "whole", architecture)
    sharded = save_tiny(tmp_path / "sharded", architecture, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one = lowbit.quantize(whole, tmp_path / "one", group_size=32)
    many = lowbit.quantize(sharded, tmp_path / "many", group_size=32, max_shard_size="20KB")
    expected, actual = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert actual.keys() == expected.keys()
    assert all(same_bits(actual[name], expected[name]) for name in expected)
    index = read_json(tmp_path / "many" / INDEX)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in expected.values()),
        "total_parameters": sum(tensor.numel() for tensor in stored_tensors(whole).values()),
    }
    for file in sorted(set(index["weight_map"].values())):
        sizes = [actual[name].nbytes for name, place in index["weight_map"].items() if place == file]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert not (tmp_path / "one" / INDEX).exists()
    assert one.output_bytes == many.output_bytes and one.layers != []


def test_shards_load(tmp_path):
    source = save_tiny(tmp_path / "source", max_shard_size="60KB")
    lowbit.quantize(source, tmp_path / "out", group_size=32, max_shard_size="20KB")
    lowbit.quantize(source, tmp_path / "single", group_size=32)
    ids = token_ids()
    with torch.no_grad():
        sharded, single = (lowbit.load(tmp_path / name)(ids).logits for name in ("out", "single"))
    assert torch.equal(sharded, single)


EXTRAS = {
    "model.extra.weight": torch.randn(8, 32),
    "counts": torch.arange(5),
    "mask": torch.tensor([True, False]),
    "scale": torch.tensor(3.5, dtype=torch.bfloat16),
    "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "none": torch.empty(0, 3, dtype=torch.uint8),
}


def test_tensors_for_others_are_copied(tmp_path, monkeypatch):
    """transformers says of some families that their checkpoints hold more than its model: all of it stays."""
    source = save_tiny(tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors.update(EXTRAS))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [f"^{name}$" for name in EXTRAS])
    lowbit.quantize(source, tmp_path / "out", group_size=32)
    stored = stored_tensors(tmp_path / "out")
    assert all(same_bits(stored[name], tensor) for name, tensor in EXTRAS.items())
    lowbit.load(tmp_path / "out")


def test_tensors_that_the_model_has_no_use_for_are_copied(tmp_path, caplog):
    """Whatever they hold, with a WARNING: what is written can be loaded, and gives the same model."""
    source = save_tiny(tmp_path / "source")
    harmless = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    unknown = {"v_head.weight": torch.ones(1, 64), "model.layers.1.self_attn.o_proj.bias": torch.ones(64)}
    edit_tensors(source, lambda tensors: tensors.update(harmless | unknown | EXTRAS))
    assert lowbit.plan(source, group_size=32).unclaimed["v_head.weight"] == "copied"
    lowbit.quantize(source, tmp_path / "out", group_size=32)
    (warning,) = [record.message for record in caplog.records if "is unknown to the model: copied" in record.message]
    assert f"(and {len(unknown | EXTRAS) - 1} more such tensors)" in warning and str(source) in warning
    stored = stored_tensors(tmp_path / "out")
    assert all(same_bits(stored[name], tensor) for name, tensor in (harmless | unknown | EXTRAS).items())
    lowbit.load(tmp_path / "out")
    assert lowbit.verify(tmp_path / "out", source, run=False).ok


def test_ties_stay_tied(tmp_path):
    source = save_tiny(tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in stored_tensors(source)
    lowbit.quantize(source, tmp_path / "out", group_size=32)
    assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["tie_word_embeddings"] is True and "lm_head" in config["quantization_config"]["ignore"]
    model = lowbit.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored_tensors(source)["model.embed_tokens.weight"])


def test_config_and_side_files_are_carried_over(tmp_path):
    source = save_tiny(tmp_path / "source")
    save_tokenizer(source)
    (source / "LICENSE").write_text("terms")
    (source / "code").mkdir()
    (source / "code" / "modeling.py").write_text("raise SystemExit('never run')")
    lowbit.quantize(source, tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    assert after.keys() == before.keys() | {"lowbit_manifest.json", "lowbit_report.json"}
    assert all(after[name] == before[name] for name in before if name not in ("config.json", "model.safetensors"))
    config = read_json(tmp_path / "out" / "config.json")
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == read_json(source / "config.json")


def test_the_source_is_left_alone(tmp_path):
    source = save_tiny(tmp_path / "source")
    before = contents(source)
    lowbit.quantize(source, tmp_path / "out")
    assert contents(source) == before


def test_snapshot_of_the_hub_cache(tmp_path):
    """Every file is a link to a blob; the output holds files."""
    plain = save_tiny(tmp_path / "plain", max_shard_size="60KB")
    save_tokenizer(plain)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, snapshot.parents[1] / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    lowbit.quantize(plain, tmp_path / "expected", group_size=32)
    lowbit.quantize(snapshot, tmp_path / "out", group_size=32)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"scheme": "W3A16_ASYM-G16", "max_shard_size": "10KB"}),
        ("gpt2", {"scheme": "W8A16-CHANNEL"}),
        ("mixtral", {"group_size": 32}),
        ("gpt_oss", {"sym": False, "group_size": 16}),
    ],
)
def test_dry_run_knows_what_will_be_written(tmp_path, architecture, options):
    source = save_tiny(tmp_path / "source", architecture)
    planned = lowbit.quantize(source, tmp_path / "out", dry_run=True, **options)
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["source"]
    written = lowbit.quantize(source, tmp_path / "out", **options)
    assert planned.output_bytes == written.output_bytes == data_bytes(tmp_path / "out")
    assert planned.source_bytes == data_bytes(source)
    differing = {k for k, v in planned.to_dict().items() if v != written.to_dict()[k]}
    assert differing <= {"layers", "seconds", "peak_memory", "date"}


def test_group_sizes_that_do_not_divide_fall_back(tmp_path):
    """hidden 64 and MLP width 172: 64 where 128 was asked, and no group of 16 or more divides 172."""
    source = save_tiny(tmp_path / "source", num_hidden_layers=1, intermediate_size=172)
    report = lowbit.quantize(source, tmp_path / "out", scheme="W4A16-G128")
    prefix = "model.layers.0."
    expected = dict.fromkeys(
        [f"{prefix}self_attn.{part}_proj.weight" for part in "qkvo"]
        + [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")],
        "W4A16-G64",
    )
    assert report.fallbacks == {**expected, f"{prefix}mlp.down_proj.weight": "W4A16-CHANNEL"}
    stored = stored_tensors(tmp_path / "out")
    assert stored[f"{prefix}mlp.down_proj.weight_scale"].shape == (64, 1)
    assert stored[f"{prefix}mlp.up_proj.weight_scale"].shape == (172, 1)
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]
    written = {t: g["weights"]["group_size"] for g in groups.values() for t in g["targets"]}
    assert written[f"{prefix}mlp.down_proj"] is None and written[f"{prefix}self_attn.q_proj"] == 64
    with torch.no_grad():
        assert lowbit.load(tmp_path / "out")(token_ids()).logits.isfinite().all()


def test_no_fallback_where_the_group_divides(tmp_path):
    source = save_tiny(tmp_path / "source")
    assert lowbit.quantize(source, tmp_path / "out", group_size=32).fallbacks == {}
    assert lowbit.quantize(source, tmp_path / "channel", group_size=-1).fallbacks == {}
    # 64 divides by 64, 96 does not
    assert set(lowbit.quantize(source, tmp_path / "64", group_size=64).fallbacks.values()) == {"W4A16-G32"}


def test_overrides_and_ignore(tmp_path):
    source = save_tiny(tmp_path / "source")
    report = lowbit.quantize(
        source,
        tmp_path / "out",
        group_size=32,
        overrides=[(r".*layers\.1\.mlp", "W8A16-G16"), (r".*down_proj", lowbit.Scheme(2, 32, False))],
        ignore=[r".*self_attn\.q_proj", "re:.*o_proj$"],
    )
    schemes = {layer["name"]: layer["scheme"] for layer in report.layers}
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "W4A16-G32"
    assert schemes["model.layers.0.mlp.down_proj.weight"] == "W2A16_ASYM-G32"
    assert schemes["model.layers.1.mlp.down_proj.weight"] == "W8A16-G16"  # the first that matches wins
    stored, dense = stored_tensors(tmp_path / "out"), stored_tensors(source)
    left = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qo"]
    assert set(report.left_alone) == {*left, "lm_head.weight"}
    assert "q_proj" in report.left_alone[left[0]] and report.left_alone["lm_head.weight"] == "output embedding"
    assert all(same_bits(stored[name], dense[name]) for name in report.left_alone)
    assert not set(left) & set(schemes)
    with torch.no_grad():
        assert lowbit.load(tmp_path / "out")(token_ids()).logits.isfinite().all()


def test_an_override_that_does_not_divide_is_a_fallback_too(tmp_path):
    source = save_tiny(tmp_path / "source", num_hidden_layers=1)
    report = lowbit.quantize(source, tmp_path / "out", group_size=32, overrides=[(".*up_proj", "W8A16-G128")])
    assert report.fallbacks == {"model.layers.0.mlp.up_proj.weight": "W8A16-G64"}


def test_numbers_of_the_report(tmp_path):
    source = save_tiny(tmp_path / "source")
    report = lowbit.quantize(source, tmp_path / "out", scheme="W4A16_ASYM-G32")
    dense, stored = stored_tensors(source), stored_tensors(tmp_path / "out")
    quantized = [name for name in dense if is_projection(name)]
    assert [layer["name"] for layer in report.layers] == [name for name in dense if name in quantized]
    assert report.quantized_tensors == len(quantized) == 14
    assert report.source_bytes == sum(tensor.nbytes for tensor in dense.values())
    assert report.output_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert report.parameters == sum(tensor.numel() for tensor in dense.values())
    assert report.quantized_share == sum(dense[name].nbytes for name in quantized) / report.source_bytes
    packed_bytes = sum(tensor.nbytes for name, tensor in stored.items() if "_proj.weight_" in name)
    assert report.bits_per_weight == 8 * packed_bytes / sum(dense[name].numel() for name in quantized)
    # 4 bits, an fp32 scale and a 4-bit zero for 32 weights, the shapes on top
    assert 5.125 < report.bits_per_weight < 5.25
    assert report.seconds > 0 and report.source == str(source)
    scheme = lowbit.Scheme.parse("W4A16_ASYM-G32")
    for layer in report.layers:
        weight, base = dense[layer["name"]], layer["name"].removesuffix("weight")
        parts = {suffix: stored[base + suffix] for suffix in ("weight_packed", "weight_scale", "weight_zero_point")}
        restored = dequantize(unpack_weight(parts, scheme, *weight.shape), torch.float64)
        error = (restored - weight.double()).norm() / weight.double().norm()
        assert layer["error"] == pytest.approx(float(error), rel=1e-4)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_progress_covers_the_plan(tmp_path):
    source = save_tiny(tmp_path / "source")
    plans, done = [], []
    report = lowbit.quantize(
        source, tmp_path / "out", on_plan=lambda plan: plans.append(plan) or (lambda step, note: done.append(step))
    )
    assert len(plans) == 1 and done == list(plans[0].steps)
    assert sum(step.source.nbytes for step in done) == report.source_bytes


def test_overwrite(tmp_path):
    source = save_tiny(tmp_path / "source")
    lowbit.quantize(source, tmp_path / "out", scheme="W8A16")
    (tmp_path / "out" / "stale").write_text("")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="--overwrite"):
        lowbit.quantize(source, tmp_path / "out")
    assert contents(tmp_path) == before
    lowbit.quantize(source, tmp_path / "out", overwrite=True)
    lowbit.quantize(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_nan_in_a_tensor_leaves_no_output(tmp_path):
    source = save_tiny(tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, :7].fill_(torch.nan))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors holds 7 "):
        lowbit.quantize(source, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_large_finite_weights_are_no_error(tmp_path, value):
    """Their sum overflows; they do not."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    edit_tensors(source, lambda tensors: tensors["model.embed_tokens.weight"].fill_(value))
    edit_tensors(source, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(value))
    lowbit.quantize(source, tmp_path / "out", group_size=32)
    stored = stored_tensors(tmp_path / "out")
    parts = {s: stored[f"model.layers.0.mlp.up_proj.{s}"] for s in ("weight_packed", "weight_scale")}
    restored = dequantize(unpack_weight(parts, lowbit.Scheme(4, 32), 96, 64), torch.float64)
    assert restored.isfinite().all()
    assert torch.allclose(restored, torch.full_like(restored, value), rtol=0.1)


def test_a_config_that_says_it_is_not_quantized(tmp_path):
    """`"quantization_config": null` is what some exporters write."""
    source = save_tiny(tmp_path / "source")
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    lowbit.quantize(source, tmp_path / "out", group_size=32)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "W7A16"},
        {"scheme": "int4"},
        {"group_size": 48},
        {"method": "magic"},
        {"options": {"scale_search": "best"}},
        {"options": {"shrink": 1}},
        {"ignore": "["},
        {"overrides": [("(", "W8A16")]},
        {"overrides": [("x", "W9A16")]},
        {"format": "gguf"},
        {"max_shard_size": "big"},
    ],
    ids=str,
)
def test_options_that_cannot_work(tmp_path, options):
    source = save_tiny(tmp_path / "source", num_hidden_layers=1)
    with pytest.raises(UsageError):
        lowbit.quantize(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEMORY = """
import re, sys
from pathlib import Path
import lowbit, torch
from lowbit.discovery import skeleton
from lowbit.folders.locate import load_config

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

source, output = sys.argv[1:]
skeleton(load_config(Path(source)))  # what an import of everything costs
torch.ones(2) @ torch.ones(2)
before = peak()
lowbit.quantize(source, output)
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Not ru_maxrss: a child inherits that of its parent."""
    source = save_random_llama(tmp_path / "source", 1024, 4096, 8)
    assert data_bytes(source) > 240e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after - before < 150, f"{before:.0f} MB before, {after:.0f} MB at the peak"
