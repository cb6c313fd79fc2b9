"""Conversion to half precision: every value is what numpy rounds it to, and what does not fit is counted."""

import numpy
import pytest
import torch
import transformers
from folders import contents, data_bytes, edit_config, edit_tensors, read_json, save_chat_model, stored_tensors
from models import save_tiny, token_ids

import lowbit
from lowbit.conversion.dtype import plan_dtype
from lowbit.errors import InputError, OutputError, UsageError

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("half") / "dense")


def plant(folder, name, values):
    """Put `values` at the beginning of a tensor."""

    def change(tensors):
        tensors[name].view(-1)[: len(values)] = torch.tensor(values)

    edit_tensors(folder, change)
    return folder


def test_every_float16_is_what_numpy_makes_of_it(tmp_path):
    dense = save_chat_model(tmp_path / "dense")
    edit_tensors(dense, lambda tensors: tensors.update({"steps": torch.arange(7)}))
    report = lowbit.convert_dtype(dense, tmp_path / "out", "FP16", max_shard_size="60kB", command="lowbit quantize")
    before, after = stored_tensors(dense), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in before.items():
        kept = name == "steps"
        expected = tensor.numpy() if kept else tensor.numpy().astype(numpy.float16)
        assert after[name].numpy().dtype == expected.dtype and (after[name].numpy() == expected).all(), name
    assert report.converted_tensors == len(before) - 1 and not report.clamped
    assert report.output_bytes == data_bytes(tmp_path / "out")
    stored = read_json(tmp_path / "out" / "lowbit_report.json")
    assert (stored["dtype"], stored["command"], stored["output_bytes"]) == (
        "FP16", "lowbit quantize", report.output_bytes
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ("FP16", "bf16"))
def test_transformers_loads_it_and_verify_passes(dtype, tmp_path):
    source, out = save_tiny(tmp_path / "dense", "qwen3_moe"), tmp_path / "out"
    lowbit.convert_dtype(source, out, dtype)
    config = read_json(out / "config.json")
    wanted = {"FP16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert config["dtype"] == str(wanted).removeprefix("torch.")
    assert "quantization_config" not in config and "torch_dtype" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == wanted and model(token_ids()).logits.isfinite().all()
    done = lowbit.verify(out, source)
    assert done.ok, done.failures
    assert {"source", "generates", "near the reference"} <= {check.name for check in done.checks}


def test_verify_finds_changed_values_and_dtypes(dense, tmp_path):
    lowbit.convert_dtype(dense, tmp_path / "out", "BF16")
    assert lowbit.verify(tmp_path / "out", dense, run=False).ok
    edit_tensors(tmp_path / "out", lambda tensors: tensors[UP][0].mul_(1.01))
    failures = lowbit.verify(tmp_path / "out", dense, run=False).failures
    assert any(line.startswith("source") and UP in line for line in failures)
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({UP: tensors[UP].float()}))
    assert any(line.startswith("coverage") for line in lowbit.verify(tmp_path / "out", run=False).failures)


def test_too_large_values_are_named_and_nothing_is_written(dense, tmp_path):
    source = save_chat_model(tmp_path / "dense")
    plant(plant(source, NORM, [65505.0, -1e6, 65504.0]), UP, [3e38])
    with pytest.raises(InputError, match=rf"{NORM} \(2\)") as raised:
        lowbit.convert_dtype(source, tmp_path / "out", "FP16")
    assert f"{UP} (1)" in str(raised.value) and "BF16" in str(raised.value) and "--clamp" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    report = lowbit.convert_dtype(source, tmp_path / "out", "FP16", clamp=True)
    assert report.clamped == {NORM: 2, UP: 1}
    stored = stored_tensors(tmp_path / "out")
    assert stored[NORM][:3].tolist() == [65504.0, -65504.0, 65504.0]
    assert lowbit.verify(tmp_path / "out", source, run=False).ok
    lowbit.convert_dtype(source, tmp_path / "bf16", "BF16")


def test_values_that_underflow_are_counted(tmp_path):
    source = plant(save_tiny(tmp_path / "dense"), NORM, [1e-8, -1e-8, 1e-7, 0.0])
    report = lowbit.convert_dtype(source, tmp_path / "out", "FP16")
    assert report.underflowed[NORM] == 2
    assert not lowbit.convert_dtype(source, tmp_path / "bf16", "BF16").underflowed


def test_dtypes_of_the_models_inside(tmp_path):
    source = save_tiny(tmp_path / "dense")
    edit_config(source, torch_dtype="float32", text_config={"dtype": "float32", "x": 1}, head={"x": 2})
    lowbit.convert_dtype(source, tmp_path / "out", "BF16")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert "torch_dtype" not in config and config["head"] == {"x": 2}


def test_the_plan_is_exact(dense, tmp_path):
    planned = plan_dtype(dense, "FP16", max_shard_size="60kB")
    lowbit.convert_dtype(dense, tmp_path / "out", "FP16", max_shard_size="60kB")
    assert planned.file_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))


def test_keys_of_the_report(dense, tmp_path):
    report = lowbit.convert_dtype(dense, tmp_path / "out", "FP16", command="what was typed")
    stored = read_json(tmp_path / "out" / "lowbit_report.json")
    assert stored == report.to_dict() and list(stored) == [
        "source", "source_revision", "dtype", "source_bytes", "output_bytes", "file_bytes", "parameters",
        "converted_tensors", "command", "clamped", "underflowed", "lowbit", "date", "versions", "machine", "seconds",
        "peak_memory",
    ]  # fmt: skip
    assert stored["lowbit"] == lowbit.__version__ and stored["seconds"] > 0 and stored["peak_memory"] > 10**8


def test_wrong_input(dense, tmp_path):
    with pytest.raises(UsageError, match="allowed: FP16, BF16"):
        lowbit.convert_dtype(dense, tmp_path / "out", "FP8")
    with pytest.raises(UsageError, match="convert_dtype"):
        lowbit.quantize(dense, tmp_path / "out", scheme="FP16")
    with pytest.raises(OutputError, match="overlap"):
        lowbit.convert_dtype(dense, dense / "out", "FP16")
    lowbit.quantize(dense, tmp_path / "q", scheme="W4A16-G32")
    with pytest.raises(InputError, match="is quantized"):
        lowbit.convert_dtype(tmp_path / "q", tmp_path / "out", "FP16")
    damaged = plant(save_tiny(tmp_path / "damaged"), NORM, [float("nan")])
    before = contents(tmp_path)
    with pytest.raises(InputError, match=NORM):
        lowbit.convert_dtype(damaged, tmp_path / "out", "FP16")
    assert contents(tmp_path) == before
