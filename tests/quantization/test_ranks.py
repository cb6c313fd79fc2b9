"""Several processes on one model: what one alone gives, to rounding, and one output."""

import json
import time
from functools import partial

import pytest
import spy_quantizer
import torch
from folders import contents, edit_tensors, stored_tensors
from models import relative_error, save_tiny, tiny_model, token_ids
from runs import (
    IDS,
    ended,
    gptq,
    job_of,
    layer_files,
    logits,
    names,
    run_and_tell,
    start_ranks,
    told_by_ranks,
)
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.quantization.calibrated.job import Job
from lowbit.quantizers import QUANTIZERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="two processes need a GPU each, or none"
    ),
]


def without_times(report: dict) -> dict:
    layers = [{k: v for k, v in layer.items() if k not in ("seconds", "objective")} for layer in report["layers"]]
    return {"layers": layers, "calibration": report["calibration"], "recipe": report["recipe"]}


@pytest.mark.parametrize(("architecture", "samples"), [("llama", 7), ("mixtral", 16)])
def test_two_processes_are_one(architecture, samples, tmp_path):
    """7 samples: one process has fewer than the other."""
    source = save_tiny(tmp_path / "model", architecture)
    ids = token_ids(samples * 64).view(samples, 64)
    alone = gptq(source, tmp_path / "alone", dataset=ids)
    out = tmp_path / "two" / "out"
    out.parent.mkdir()
    assert ended(start_ranks(source, out, dataset=ids)) == [0, 0]
    first, second = told_by_ranks(out)
    assert names(out.parent) == ["out"]
    assert json.loads((out / "lowbit_report.json").read_text())["layers"] == first["layers"]
    assert without_times(first) == without_times(second)

    expected = json.loads(json.dumps(alone.to_dict()))
    same = ("name", "expert", "scheme", "damping")
    assert [[x.get(k) for k in same] for x in first["layers"]] == [[x.get(k) for k in same] for x in expected["layers"]]
    # the first linears are computed from the same numbers; what follows can round the other way somewhere
    before, after = stored_tensors(tmp_path / "alone"), stored_tensors(out)
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight_packed"
        assert float((before[name] == after[name]).float().mean()) > 0.995
    wanted = logits(tiny_model(architecture), ids)
    errors = [relative_error(logits(lowbit.load(folder), ids), wanted) for folder in (tmp_path / "alone", out)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    together = [
        (x["output_error"], y["output_error"]) for x, y in zip(first["layers"], expected["layers"], strict=True)
    ]
    assert all(a == pytest.approx(b, rel=0.5) for a, b in together)


def spied(told, source, output, options) -> None:
    """Leaves what the quantizer was given, too."""
    run_and_tell(told, source, output, {**options, **spy_quantizer.install()})
    given = {f"{i}.{j}": t.contiguous() for i, call in enumerate(spy_quantizer.SEEN) for j, t in enumerate(call)}
    save_file(given, told.with_suffix(".safetensors"))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_moments_of_two_processes_are_those_of_one(architecture, tmp_path, monkeypatch):
    """Of every linear and expert; each process gets half of the rows of each weight."""
    monkeypatch.setitem(QUANTIZERS, "spy", None)
    source = save_tiny(tmp_path / "model", architecture)
    ids = token_ids(33 * 64).view(33, 64)
    gptq(source, tmp_path / "alone", dataset=ids, **spy_quantizer.install())
    out = tmp_path / "out"
    assert ended(start_ranks(source, out, function=spied, dataset=ids)) == [0, 0]
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert len(first) == 3 * len(spy_quantizer.SEEN) > 20
    for call, (weight, hessian, missing) in enumerate(spy_quantizer.SEEN):
        assert torch.equal(torch.cat([first[f"{call}.0"], second[f"{call}.0"]]), weight)
        for part in (first, second):
            assert relative_error(part[f"{call}.1"], hessian) < 1e-5
        lacking, scale = torch.cat([first[f"{call}.2"], second[f"{call}.2"]]), (weight.float() @ hessian).norm()
        assert float((lacking - missing).norm() / scale) < 1e-5
    assert contents(out) == contents(tmp_path / "alone")


def test_an_expert_whose_tokens_are_all_in_one_process(tmp_path):
    """Two tokens, each in the samples of one process, that go to different experts."""
    source = save_tiny(tmp_path / "model", "mixtral")
    ids = torch.cat([torch.full((8, 64), 5), torch.full((8, 64), 9)])
    alone = gptq(source, tmp_path / "alone", dataset=ids)
    assert {layer["tokens"] for layer in alone.layers if ".layers.0." in layer["name"]} == {256, 512, 1024}
    out = tmp_path / "out"
    assert ended(start_ranks(source, out, dataset=ids)) == [0, 0]
    first, second = told_by_ranks(out)
    assert without_times(first) == without_times(second)
    for entry, expected in zip(first["layers"], alone.layers, strict=True):
        if ".layers.0." in entry["name"]:
            assert (entry["tokens"], entry["note"]) == (expected["tokens"], expected["note"])
            assert 0 < entry["output_error"] < 0.01


def waiting_behind(layers, told, source, output, options) -> None:
    """A run that stays, for ever, where so many layers are committed."""
    drop_streams = Job.drop_streams

    def waiting(self, number, rank):
        drop_streams(self, number, rank)
        if number == len(self.layers) == layers:
            told.touch()
            time.sleep(3600)

    Job.drop_streams = waiting  # in this process only
    gptq(source, output, **options)


def start_and_kill(source, out, layers: int) -> None:
    """Kill both processes when so many layers are committed."""
    processes = start_ranks(source, out, function=partial(waiting_behind, layers))
    waiting = [out.with_name(f"rank-{rank}.json") for rank in (0, 1)]
    while not all(path.exists() for path in waiting):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
    ended(processes)
    for path in waiting:
        path.unlink()
    assert not out.exists() and len(layer_files(out)) == layers


def test_killed_and_gone_on_with(tmp_path):
    source = save_tiny(tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "whole").mkdir()
    assert ended(start_ranks(source, tmp_path / "whole" / "out")) == [0, 0]
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    start_and_kill(source, out, 1)
    assert ended(start_ranks(source, out)) == [0, 0]
    told_by_ranks(out)
    assert contents(out) == contents(tmp_path / "whole" / "out")
    assert names(out.parent) == ["out"]


def test_hidden_states_that_one_process_lost(tmp_path):
    source = save_tiny(tmp_path / "model", num_hidden_layers=3)
    out = tmp_path / "out"
    start_and_kill(source, out, 2)
    for streams in job_of(out).glob("streams-*-1"):
        (streams / "model.safetensors").unlink(missing_ok=True)  # the kill came while it was being removed
    assert ended(start_ranks(source, out)) == [0, 0]
    told_by_ranks(out)
    assert ended(start_ranks(source, tmp_path / "whole")) == [0, 0]
    assert contents(out) == contents(tmp_path / "whole")


def refused(source, out, *errors: str, **options) -> list[dict]:
    """Both processes end with one line, and by themselves: neither waits for the other."""
    assert ended(start_ranks(source, out, **options)) == [1 + ("Usage" in error) for error in errors]
    told = told_by_ranks(out)
    assert tuple(t["error"] for t in told) == errors
    assert all("\n" not in t["message"] for t in told)
    return told


def test_errors_end_all_processes(tmp_path):
    source = save_tiny(tmp_path / "model")
    out = tmp_path / "out"
    for told in refused(source, out, "UsageError", "UsageError", dataset=IDS[:1]):
        assert "too few for 2 processes" in told["message"]
    for told in refused(source, out, "InputError", "InputError", dataset=IDS + 100):
        assert "vocabulary" in told["message"]
    assert names(tmp_path) == ["model"]


def test_errors_of_the_first_process_end_the_other(tmp_path):
    source = save_tiny(tmp_path / "model")
    gptq(source, tmp_path / "out")
    before = contents(tmp_path)
    first, second = refused(source, tmp_path / "out", "OutputError", "OutputError")
    assert "--overwrite" in first["message"] and "another process" in second["message"]
    assert contents(tmp_path) == before


def test_nan_in_the_middle(tmp_path):
    source = save_tiny(tmp_path / "model")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    for told in refused(source, tmp_path / "out", "InputError", "InputError"):
        assert "model.layers.1.mlp.up_proj.weight" in told["message"]
    assert not (tmp_path / "out").exists() and len(layer_files(tmp_path / "out")) == 1


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    """Hidden states are divided over the processes, and sums are rounded otherwise."""
    source = save_tiny(tmp_path / "model")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    refused(source, tmp_path / "out", "InputError", "InputError")
    with pytest.raises(lowbit.errors.OutputError, match="processes: 2 then, 1 now"):
        gptq(source, tmp_path / "out")
