"""The report that a run leaves in its folder: one for every run, whole, true, and of that run alone."""

import json
from importlib.metadata import version

import pytest
import torch
from covering import slow_but
from folders import data_bytes, read_json
from models import save_tiny, token_ids
from runs import quick_gptq, stop_after_layers

import lowbit
from lowbit.checkpoint.report_file import load_report, save_report
from lowbit.errors import InputError, OutputError

pytestmark = pytest.mark.slow

KEYS = [
    "source", "source_revision", "recipe", "format", "command", "source_bytes", "output_bytes", "parameters",
    "quantized_tensors", "converted", "quantized_share", "bits_per_weight", "fallbacks", "left_alone", "unclaimed",
    "parts", "lowbit", "date", "versions", "machine", "seconds", "peak_memory", "adapter", "expected_peak",
    "calibration", "allocation", "quality", "decoder_layers", "layers",
]  # fmt: skip
LAYER_KEYS = {"name", "module", "kind", "scheme", "shape", "source_bytes", "bytes", "error"}
MEASURED_KEYS = {
    "tokens", "damping", "objective", "moved", "seconds", "note", "output_error", "output_error_to_original",
    "rounding_error", "drift",
}  # fmt: skip


@pytest.fixture(scope="module", params=slow_but(("llama", "mixtral"), ["llama", "gpt2", "mixtral", "gpt_oss"]))
def architecture(request):
    return request.param


@pytest.mark.parametrize("calibrated", [False, True], ids=["rtn", "gptq"])
def test_every_run_leaves_one(architecture, calibrated, tmp_path):
    source = save_tiny(tmp_path / "source", architecture)
    quantize = quick_gptq if calibrated else lowbit.quantize
    report = quantize(source, tmp_path / "out", scheme="W4A16_ASYM", group_size=16, command="what was typed")
    stored = read_json(tmp_path / "out" / "lowbit_report.json")
    assert stored == load_report(tmp_path / "out") == report.to_dict() and list(stored) == KEYS
    assert stored["lowbit"] == stored["versions"]["lowbit"] == lowbit.__version__
    assert stored["versions"]["torch"] == version("torch") and stored["command"] == "what was typed"
    assert stored["seconds"] > 0 and stored["peak_memory"] > 10**8 and stored["machine"]
    assert lowbit.Recipe.from_dict(stored["recipe"]).scheme.name == "W4A16_ASYM-G16"
    assert (stored["calibration"] is not None) == calibrated and stored["quality"] is None

    # every byte is somebody's
    assert sum(part["bytes"] for part in stored["parts"].values()) == data_bytes(tmp_path / "out")
    assert sum(part["source_bytes"] for part in stored["parts"].values()) == data_bytes(source)
    weights = sum(layer["source_bytes"] for layer in stored["layers"])
    assert weights == pytest.approx(stored["quantized_share"] * stored["source_bytes"])
    packed = sum(layer["bytes"] for layer in stored["layers"])
    assert packed == stored["bits_per_weight"] * weights / 4 / 8  # 4 bytes of float32 for each

    for layer in stored["layers"]:
        measured = MEASURED_KEYS if calibrated else set()
        expert = {"expert", "routed"} if calibrated and "expert" in layer else set()
        assert layer.keys() == LAYER_KEYS | measured | expert
        assert torch.Size(layer["shape"]).numel() * 4 == layer["source_bytes"] and 0 < layer["error"] < 0.5
        assert layer["module"].endswith(layer["kind"]) and "." not in layer["kind"] and layer["kind"] != "weight"
        if "c_fc" in layer["name"]:  # stored as [in_features, out_features]
            assert layer["shape"] == [256, 64]


def test_module_is_the_name_that_overrides_match(tmp_path):
    source = save_tiny(tmp_path / "source", "mixtral")
    modules = {layer["module"] for layer in lowbit.quantize(source, tmp_path / "out", group_size=16).layers}
    for module in sorted(modules):
        report = lowbit.quantize(source, tmp_path / "dry", group_size=16, ignore=[module], dry_run=True)
        assert module in report.left_alone or report.quantized_tensors < len(modules) * 8


def test_time_of_a_run_that_was_stopped(tmp_path, monkeypatch):
    source, out = save_tiny(tmp_path / "source", num_hidden_layers=3), tmp_path / "out"
    stop_after_layers(monkeypatch, 2, lambda: quick_gptq(source, out))
    state = read_json(tmp_path / ".out.job" / "job.json")
    for layer in state["layers"]:
        layer["report"]["seconds"] = 1e6
    (tmp_path / ".out.job" / "job.json").write_text(json.dumps(state))
    report = quick_gptq(source, out)
    assert 2e6 < report.seconds < 3e6 and len(report.layers) == 21


def test_revision_of_a_model_from_the_hub(tmp_path):
    source = save_tiny(tmp_path / "models--org--name" / "snapshots" / "0123abc")
    assert lowbit.quantize(source, tmp_path / "out").source_revision == "0123abc"


def test_a_report_belongs_to_its_run(tmp_path):
    source = save_tiny(tmp_path / "source")
    (source / "lowbit_report.json").write_text('{"source": "another run"}')
    lowbit.quantize(source, tmp_path / "out")
    assert load_report(tmp_path / "out")["source"] == str(source)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_unreadable_reports_are_errors(content, tmp_path):
    (tmp_path / "lowbit_report.json").write_bytes(content)
    with pytest.raises(InputError, match=r"lowbit_report\.json") as caught:
        load_report(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and "quantize again" in str(caught.value)


def test_folders_without_a_report(tmp_path):
    with pytest.raises(InputError, match="holds no lowbit_report"):
        load_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_report(tmp_path / "nowhere")


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "lowbit_report.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        save_report(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["lowbit_report.json"]


def test_tokens_that_were_routed(tmp_path):
    source = save_tiny(tmp_path / "source", "mixtral")
    ids = token_ids(4 * 16).view(4, 16)
    report = quick_gptq(source, tmp_path / "out", dataset=ids)
    for module in {layer["module"] for layer in report.layers if "expert" in layer}:
        routed = {layer["expert"]: layer["routed"] for layer in report.layers if layer["module"] == module}
        assert sum(routed.values()) == 2 * ids.numel() and len(routed) == 4  # each token goes to two of four
