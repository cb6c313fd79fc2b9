"""Smoothed runs: the model that is quantized is the one that was given, errors shrink, and files say what was done."""

import re
import shutil
from itertools import cycle

import pytest
import torch
import transformers
from folders import contents, edit_tensors, read_json, stored_tensors, write_json
from models import relative_error, save_tiny
from runs import IDS, assert_finished, ended, job_of, logits, start_ranks, stop_after_layers
from runs import gptq as gptq_of
from runs import quick_gptq as gptq
from safetensors.torch import save_file

import lowbit
from lowbit.calibration.recorded import recorded_edits, scaled
from lowbit.checkpoint import CheckpointReader
from lowbit.discovery import CheckpointNames, skeleton
from lowbit.errors import UsageError
from lowbit.folders.locate import load_config

pytestmark = pytest.mark.slow

CHANNELS = (3, 17, 40)  # of the outliers
FOLDS = {"llama": 4, "qwen2": 4, "gemma2": 4, "gpt2": 2, "qwen3_moe": 3, "qwen2_moe": 4}


def save_with_outliers(folder, name="llama", dtype=torch.float32, size=32.0, **options):
    """Norms of layers put out three channels that are far larger than the others. Of a llama the weights that multiply
    them are smaller by as much, so that the model is as sane as it was."""
    save_tiny(folder, name, dtype, **options)
    offset, channels = 1.0 if name.startswith("gemma") else 0.0, list(CHANNELS)

    def plant(tensors):
        for key, tensor in tensors.items():
            if re.search(r"\d\.\w*(layernorm|ln_\d)\.weight", key):
                tensor[channels] = (tensor[channels] + offset) * size - offset
            elif name == "llama" and re.search("(q|k|v|gate|up)_proj", key):
                tensor[:, channels] /= size

    edit_tensors(folder, plant)
    return folder


def rtn(source, out, **options):
    return lowbit.quantize(source, out, **{"dataset": IDS, "group_size": 16, "smooth": "auto", **options})


def smoothings(report) -> list[dict]:
    return [entry for layer in report.decoder_layers for entry in layer["smoothing"]]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def smoothed_source(source, out, folder):
    """The model that the run quantized: the source, scaled as its report says."""
    shutil.copytree(source, folder)
    reader, names = CheckpointReader(source), CheckpointNames(skeleton(load_config(source)))
    layers = read_json(out / "lowbit_report.json")["decoder_layers"]
    edits = recorded_edits(layers, names, reader.tensors, reader.tensor)
    tensors = {name: scaled(name, reader.tensor(name), edits, names) for name in reader.tensors}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def rounded_again(model, dtype):
    """Scaled matrices are rounded again, and vectors too: what that alone does to a model, with random scales."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scales = 1 + torch.rand(parameter.shape[-1], generator=generator)
            parameter.copy_((parameter * scales).to(dtype).float() / scales)
    return model


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(FOLDS, cycle((torch.float32, torch.bfloat16)), strict=False), ("llama", torch.bfloat16)]
)
def test_smoothing_alone_leaves_the_logits_as_they_were(name, dtype, tmp_path):
    """Before quantization, to rounding; what is not quantized is in the output as it was scaled, and `verify` knows."""
    source = save_with_outliers(tmp_path / "source", name, dtype)
    report = rtn(source, tmp_path / "out", smooth=0.5)
    entries = smoothings(report)
    assert len(entries) == 2 * FOLDS[name] and all(entry.get("alpha") == 0.5 for entry in entries)
    folder = smoothed_source(source, tmp_path / "out", tmp_path / "smoothed")
    before, after = (logits(load(path).float()) for path in (source, folder))
    again = relative_error(logits(rounded_again(load(source).float(), dtype)), before)
    assert relative_error(after, before) < 3 * again + 1e-4
    given, made, written = (stored_tensors(path) for path in (source, folder, tmp_path / "out"))
    assert all(torch.equal(tensor, made[key]) for key, tensor in written.items() if key in made)
    assert sum(not torch.equal(given[key], written[key]) for key in given if key in written) >= 4
    assert lowbit.verify(tmp_path / "out", source, run=False).ok


@pytest.mark.parametrize("scheme, gain", [("W4A16-CHANNEL", 0.9), ("W3A16-G16", 0.9)])
def test_outliers_cost_less(scheme, gain, tmp_path):
    """Of the error of the logits at most the share `gain` is left."""
    source = save_with_outliers(tmp_path / "source")
    wanted, errors = logits(load(source)), []
    for smooth in (None, "auto"):
        out = tmp_path / f"out-{smooth}"
        report = lowbit.quantize(source, out, scheme=scheme, dataset=IDS if smooth else None, smooth=smooth)
        errors.append(relative_error(logits(lowbit.load(out, dtype="float32").dequantize()), wanted))
    assert errors[1] < gain * errors[0]
    best = [entry for entry in smoothings(report) if entry["alpha"] is not None]
    assert best and all(entry["output_error"] < entry["output_error_before"] for entry in best)


def with_rounded_inputs(model, bits=8):
    """Linears of the layers round their inputs, token by token."""

    def rounded(module, args):
        step = args[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        return ((args[0] / step).round() * step,)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(rounded)
    return model


def test_activations_of_eight_bits(tmp_path):
    """W8A8 with per-token scales, simulated: SmoothQuant leaves less than 60 % of the error."""
    source = save_with_outliers(tmp_path / "source")
    wanted, errors = logits(load(source)), []
    for smooth in (None, 0.5):
        out = tmp_path / f"out-{smooth}"
        lowbit.quantize(source, out, scheme="W8A16-CHANNEL", dataset=IDS if smooth else None, smooth=smooth)
        model = with_rounded_inputs(lowbit.load(out, dtype="float32").dequantize())
        errors.append(relative_error(logits(model), wanted))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("format", ("compressed-tensors", "gptq", "awq"))
def test_lowbit_runs_it_in_every_format(format, tmp_path):
    source = save_with_outliers(tmp_path / "source", "qwen2")
    report = gptq_of(source, tmp_path / "out", smooth="auto", format=format)
    model = lowbit.load(tmp_path / "out", dtype="float32")
    assert relative_error(logits(model), logits(load(source))) < 0.2
    assert any(entry["alpha"] is not None for entry in smoothings(report))


@pytest.mark.parametrize("streams", ("kept", "lost"))
@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_a_stopped_run_goes_on(name, streams, tmp_path, monkeypatch):
    """To the same bytes; without the hidden states, finished layers are run again as they were scaled."""
    source, options = save_with_outliers(tmp_path / "source", name), {"smooth": "auto"}
    gptq(source, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    out = tmp_path / "out"
    stop_after_layers(monkeypatch, 1, lambda: gptq(source, out, **options))
    if streams == "lost":
        for folder in job_of(out).glob("streams-*"):
            shutil.rmtree(folder)
    gptq(source, out, **options)
    assert_finished(out, expected, beside=["source"])


def test_two_processes(tmp_path):
    source = save_with_outliers(tmp_path / "source", num_hidden_layers=1)
    alone = gptq(source, tmp_path / "alone", smooth=0.5)
    out = tmp_path / "two" / "out"
    out.parent.mkdir()
    assert ended(start_ranks(source, out, smooth=0.5)) == [0, 0]
    report = read_json(out / "lowbit_report.json")
    scales = [[entry["exponents"] for entry in smoothings(alone)]]
    scales.append([entry["exponents"] for layer in report["decoder_layers"] for entry in layer["smoothing"]])
    assert scales[0] == scales[1]
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(stored_tensors(out)[name], stored_tensors(tmp_path / "alone")[name])


def test_unquantized_weights_are_not_smoothed_for(tmp_path):
    """Nothing is scaled for weights that are not quantized; those that are beside quantized ones are scaled along."""
    source = save_with_outliers(tmp_path / "source")
    report = rtn(source, tmp_path / "out", smooth=0.5, ignore=[".*mlp", ".*q_proj"])
    reasons = {entry["producer"]: entry.get("reason") for entry in smoothings(report)}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "nothing behind it is quantized"
    assert reasons["model.layers.0.input_layernorm.weight"] is None
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert lowbit.verify(tmp_path / "out", source, run=False, max_unquantized=1).ok


def test_verify_finds_what_was_not_scaled_alike(tmp_path):
    source, out = save_with_outliers(tmp_path / "source"), tmp_path / "out"
    rtn(source, out, smooth=0.5, scheme="W8A16")
    assert lowbit.verify(out, source, run=False).ok
    whole = read_json(out / "lowbit_report.json")
    write_json(out / "lowbit_report.json", {**whole, "decoder_layers": []})
    failures = lowbit.verify(out, source, run=False).failures
    assert len(failures) == 1 and failures[0].startswith("source")
    broken = read_json(out / "lowbit_report.json") | {"decoder_layers": [{"smoothing": [{"exponents": "AA=="}]}]}
    write_json(out / "lowbit_report.json", broken)
    assert "is damaged" in lowbit.verify(out, source, run=False).failures[0]
    one = whole["decoder_layers"][1]["smoothing"][0]
    one["exponents"] = one["exponents"][4:8] + one["exponents"][4:]
    write_json(out / "lowbit_report.json", whole)
    assert one["consumers"][0] in lowbit.verify(out, source, run=False).failures[0]


def test_a_model_without_outliers_is_left_as_it_is(tmp_path):
    """alpha "auto" never makes the output error that it looks at larger."""
    source = save_tiny(tmp_path / "source")
    for entry in smoothings(rtn(source, tmp_path / "out")):
        assert entry["output_error"] <= entry["output_error_before"]


@pytest.mark.parametrize("smooth", ("often", -0.1, 1.5, "nan", [0.5]))
def test_wrong_alpha(smooth, tmp_path):
    with pytest.raises(UsageError, match="expected auto, or a number from 0 to 1"):
        rtn(tmp_path, tmp_path / "out", smooth=smooth)
