"""Matrices that checkpoints hold fused, joined or in another order than the model: quantized as those of the model."""

import json
import subprocess
import sys

import pytest
import torch
from folders import edit_tensors, stored_tensors
from models import relative_error
from tiny import logits, tiny_model_that_runs
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.computed import as_loaded
from lowbit.discovery import CheckpointNames
from lowbit.errors import InputError

# Plain transformers with the compressed-tensors package, and no lowbit in the process
_FOREIGN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(sys.argv[2]))).logits, sys.argv[3])
assert "lowbit" not in sys.modules
"""
# A linear attention whose queries, keys, values and gates are rows of one matrix, split by unequal sizes
SPLIT = "lara_mini"
pytestmark = [
    pytest.mark.skipif(SPLIT not in CONFIG_MAPPING, reason=f"this transformers has no {SPLIT}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def model():
    return tiny_model_that_runs("AutoModelForCausalLM", SPLIT)


@pytest.fixture(scope="module")
def dense(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("computed") / "dense"
    model[0].save_pretrained(folder)
    return folder


def fused(tensors) -> list[str]:
    return [name for name in tensors if ".in_proj." in name]


def test_computed_weights_equal_those_transformers_loads(model, dense):
    reader, loaded = CheckpointReader(dense), model[0].state_dict()
    (source,) = fused(reader.tensors)
    wanted = source.replace("in_proj", "in_proj_qkv")
    tensors = as_loaded(reader.tensors, CheckpointNames(model[0]), {wanted})
    made = {name: info for name, info in tensors.items() if name not in reader.tensors}
    assert source not in tensors and wanted in made and len(made) == 4
    for name, info in made.items():
        assert info.shape == loaded[name].shape and info.dtype == loaded[name].dtype
        assert torch.equal(info.read(), loaded[name])
    # in the place of their source, and everything else as it was
    assert [name for name in tensors if name not in made] == [name for name in reader.tensors if name != source]
    assert as_loaded(reader.tensors, CheckpointNames(model[0]), set()) == reader.tensors


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_split_matrices_are_quantized(sym, model, dense, tmp_path):
    ours = tmp_path / "packed"
    report = lowbit.quantize(dense, ours, group_size=32, sym=sym)
    assert "computed from while loading" not in report.left_alone.values()
    assert not fused(stored_tensors(ours))
    assert lowbit.verify(ours, dense, run=False).ok
    quantized = lowbit.load(ours)
    assert quantized.get_submodule("model.layers.0.linear_attn.in_proj_qkv").scheme.sym == sym
    expected = logits(quantized.dequantize(), model[1])
    assert relative_error(logits(lowbit.load(ours), model[1]), expected) < 1e-5


@pytest.mark.slow
def test_plain_transformers_agrees(model, dense, tmp_path):
    pytest.importorskip("compressed_tensors")
    lowbit.quantize(dense, tmp_path / "packed", group_size=32, ignore="experts")  # it has no packed experts
    ids = json.dumps(model[1]["input_ids"].tolist())
    command = [sys.executable, "-c", _FOREIGN, tmp_path / "packed", ids, tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert relative_error(logits(lowbit.load(tmp_path / "packed"), model[1]), expected) < 1e-5


def test_with_data(model, dense, tmp_path):
    """Each part has an error of its own to correct, and statistics of the inputs that they share."""
    ids = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    errors = {}
    for method in ("rtn", "gptq"):
        data = {"dataset": ids} if method == "gptq" else {}
        report = lowbit.quantize(dense, tmp_path / method, group_size=32, method=method, **data)
        assert not fused(report.left_alone)
        assert lowbit.verify(tmp_path / method, dense, run=False).ok
        inputs = {"input_ids": ids}
        errors[method] = relative_error(logits(lowbit.load(tmp_path / method), inputs), logits(model[0], inputs))
    assert errors["gptq"] < errors["rtn"]


def test_weights_not_computable_before_loading_stay_dense(model, dense, tmp_path, monkeypatch):
    """An operation that looks at the values of its tensors, say."""
    names = CheckpointNames(model[0])
    (conversion,) = names.conversions(fused(CheckpointReader(dense).tensors))
    operation = type(conversion.converter.operations[0])
    convert = operation.convert

    def only_of_values(self, input_dict, *args, **kwargs):
        if next(iter(input_dict.values()))[0].is_meta:
            raise RuntimeError("there are no values")
        return convert(self, input_dict, *args, **kwargs)

    monkeypatch.setattr(operation, "convert", only_of_values)
    report = lowbit.quantize(dense, tmp_path / "packed", group_size=32)
    assert "computed from while loading" in report.left_alone.values()
    assert fused(stored_tensors(tmp_path / "packed"))
    lowbit.load(tmp_path / "packed")


def test_damage_of_a_source_is_told(dense, tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def damage(tensors):
        tensors[fused(tensors)[0]][-1, 0] = torch.nan

    edit_tensors(folder, damage)
    with pytest.raises(InputError, match=r"linear_attn\.in_proj\w* in model\.safetensors holds 1 NaN|in_proj_a.*1 NaN"):
        lowbit.quantize(folder, tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()


def test_verification_compares_each_part(dense, tmp_path):
    lowbit.quantize(dense, tmp_path / "packed", group_size=32)

    def damage(tensors):
        tensors["model.layers.0.linear_attn.in_proj_z.weight_packed"] ^= 0x33333333

    edit_tensors(tmp_path / "packed", damage)
    checked = lowbit.verify(tmp_path / "packed", dense, run=False)
    assert "model.layers.0.linear_attn.in_proj_z is far from" in "\n".join(checked.failures)
