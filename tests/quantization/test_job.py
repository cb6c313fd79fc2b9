"""What an unfinished calibrated run leaves: the same call goes on from it, another one does not take it."""

import hashlib
import os
import shutil

import pytest
import spy_quantizer
import torch
from folders import contents, edit_tensors, read_json, same_bits, save_chat_model, stored_tensors, write_json
from models import save_tiny
from runs import IDS, LAYERS, assert_finished, job_of, layer_files, names, stop_after_layers
from runs import quick_gptq as gptq
from safetensors.torch import load_file, save_file

from lowbit.errors import InputError, LowbitError, OutputError, UsageError
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.run import quantize
from lowbit.quantizers import QUANTIZERS
from lowbit.text.samples import Samples

pytestmark = pytest.mark.slow


@pytest.fixture
def unfinished(source, out, monkeypatch):
    """unfinished(layers, **options): a run to `out` that was stopped when so many layers were committed."""

    def run(layers, **options):
        stop_after_layers(monkeypatch, layers, lambda: gptq(source, out, **options))
        assert len(layer_files(out)) == layers and not out.exists()

    return run


@pytest.fixture
def loaded(monkeypatch):
    """Numbers of the layers that were loaded to be quantized, in order."""
    numbers, load = [], LayeredModel.load

    def load_and_tell(self, number, tensors):
        numbers.append(number)
        load(self, number, tensors)

    monkeypatch.setattr(LayeredModel, "load", load_and_tell)
    return numbers


# Gone on with


def assert_goes_on(source, out, expected, layer: int, **options) -> None:
    lines = []
    gptq(source, out, announce=lines.append, **options)
    going_on = [line for line in lines if line.startswith("going on")]
    assert going_on == ([f"going on from layer {layer} of {LAYERS}"] if layer > 1 else [])
    assert_finished(out, expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_run_resumes_at_the_next_layer(source, out, expected, unfinished, loaded, layers):
    """Finished layers are not loaded again, where the hidden states behind them are there."""
    unfinished(layers)
    loaded.clear()
    assert_goes_on(source, out, expected, layers + 1)
    assert loaded == [number for number in range(layers, LAYERS) for _ in ("original", "quantized")]


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


DAMAGES = {"flipped bit": flip, "cut": lambda path: os.truncate(path, 100), "gone": os.remove}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_layer_is_done_again(source, out, expected, unfinished, damage, layer):
    unfinished(2)
    DAMAGES[damage](layer_files(out)[layer])
    assert_goes_on(source, out, expected, layer + 1)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("damage", ["cut", "gone", "folder gone"])
def test_hidden_states_that_are_lost(source, out, expected, unfinished, damage, layers):
    unfinished(layers)
    (streams,) = job_of(out).glob("streams-*")
    assert streams.name == f"streams-{layers:04d}-0"
    if damage == "folder gone":
        shutil.rmtree(streams)
    else:
        DAMAGES[damage](streams / "model.safetensors")
    assert_goes_on(source, out, expected, layers + 1)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, 2.0, None], ids=["NaN", "another number", "no digest"])
def test_hidden_states_that_were_changed_are_made_again(source, out, expected, unfinished, value, layers):
    """The file is whole and its header right: only the digest in job.json tells."""
    unfinished(layers)
    (streams,) = job_of(out).glob("streams-*")
    if value is None:
        edit_state(out, lambda state: [layer.pop("streams") for layer in state["layers"]])
    else:
        edit_tensors(streams, lambda tensors: tensors["quantized.0"].view(-1)[-2:].fill_(value))
    assert_goes_on(source, out, expected, layers + 1)


def edit_state(out, change) -> None:
    state = read_json(job_of(out) / "job.json")
    change(state)
    write_json(job_of(out) / "job.json", state)


def forge_layer(out, number: int, change) -> None:
    """Rewrite a layer's file after `change(tensors)`, and give it the hash that it has then."""
    file = layer_files(out)[number]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)

    def rehash(state):
        state["layers"][number]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    edit_state(out, rehash)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("weight_scale"))),
        lambda tensors: tensors.update({name: t[:-1].clone() for name, t in tensors.items() if t.ndim == 2}),
        lambda tensors: tensors.update({name: t.float() for name, t in tensors.items() if t.dtype == torch.int32}),
        lambda tensors: tensors.update(stranger=torch.ones(1)),
    ],
    ids=["missing", "shape", "dtype", "stranger"],
)
def test_layers_that_this_run_would_not_write_are_done_again(source, out, expected, unfinished, change):
    unfinished(2)
    forge_layer(out, 1, change)
    assert_goes_on(source, out, expected, 2)


def test_more_layers_than_the_model_has_are_not_taken(source, out, expected, unfinished):
    unfinished(2)
    edit_state(out, lambda state: state["layers"].extend(state["layers"] * 5))
    assert_goes_on(source, out, expected, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["identity"].update(tokens=5),
        lambda state: state["layers"][0]["report"].pop("modules"),
        lambda state: state["layers"][0]["report"].update(seconds="x"),
        lambda state: state["layers"][0]["report"].update(smoothing="x"),
        lambda state: state["layers"][0]["report"]["modules"].append(5),
        lambda state: state["layers"][0]["report"]["modules"][0].update(output_error=[]),
        lambda state: state["layers"][0].update(file="../x"),
        lambda state: state["layers"][0].update(sha256=5),
        lambda state: state["layers"][0].update(streams="x"),
        lambda state: state.update(output="x"),
    ],
)
def test_a_job_of_other_types_is_one_line(source, out, unfinished, change):
    unfinished(1)
    edit_state(out, change)
    with pytest.raises(OutputError, match=r"job\.json.*--overwrite") as caught:
        gptq(source, out)
    assert "\n" not in str(caught.value) and not out.exists()


def test_stored_samples_outside_of_the_vocabulary_are_made_again(source, out, expected, unfinished):
    """With a digest that fits them: bytes of the neighbours of the embedding would be read."""
    unfinished(1)
    (file,) = job_of(out).glob("samples-*")
    ids = load_file(file)["input_ids"]
    ids[0, 0] = 10**6
    digest = Samples(ids, "x").digest
    file.unlink()
    save_file({"input_ids": ids}, job_of(out) / f"samples-{digest[:16]}.safetensors", {"source": "x"})
    edit_state(out, lambda state: state["identity"].update(tokens=digest))
    with pytest.raises(OutputError, match=r"tokens: .* then"):
        gptq(source, out)


def test_samples_that_are_lost(source, out, expected, unfinished):
    unfinished(1)
    for file in job_of(out).glob("samples*"):
        flip(file)
    assert_goes_on(source, out, expected, 2)


def test_leftovers_of_earlier_runs_do_no_harm(source, out, expected, unfinished):
    unfinished(1)
    for name in ("streams-0002-0", "streams-0002-0.partial", "layer.partial"):
        (job_of(out) / name).mkdir()
        (job_of(out) / name / "model.safetensors").write_bytes(b"cut")
    (job_of(out) / "job.json.partial").write_text("{")
    assert_goes_on(source, out, expected, 2)


# Other settings

OTHER = {
    "bits": ({"scheme": "W8A16"}, "recipe.scheme"),
    "group": ({"group_size": 32}, "recipe.scheme"),
    "damping": ({"options": {"damping": 0.1}}, "recipe.options.damping: 0.03 then, 0.1 now"),
    "head": ({"lm_head": True}, "recipe"),
    "samples": ({"num_samples": 4}, "calibration.num_samples: 128 then, 4 now"),
    "tokens": ({"dataset": IDS.flip(0)}, "tokens"),
    "ignored": ({"ignore": ["model.norm"]}, "recipe.ignore"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_settings_are_refused(source, out, expected, unfinished, what):
    options, says = OTHER[what]
    unfinished(1)
    before = contents(out.parent)
    with pytest.raises(OutputError) as refusal:
        gptq(source, out, **options)
    message = str(refusal.value)
    assert says in message and "--overwrite" in message and str(job_of(out)) in message and "\n" not in message
    after = contents(out.parent)
    assert {k: v for k, v in after.items() if "samples" not in k} == {
        k: v for k, v in before.items() if "samples" not in k
    }
    assert_goes_on(source, out, expected, 2)


def test_overwrite_starts_anew(source, out, unfinished):
    unfinished(2)
    lines = []
    gptq(source, out, scheme="W8A16", overwrite=True, announce=lines.append)
    assert not any("going on" in line for line in lines)
    gptq(source, out.with_name("fresh"), scheme="W8A16")
    assert contents(out) == contents(out.with_name("fresh"))


def test_overwrite_goes_on_with_the_same_settings(source, out, expected, unfinished):
    unfinished(2, overwrite=True)
    lines = []
    gptq(source, out, overwrite=True, announce=lines.append)
    assert f"going on from layer 3 of {LAYERS}" in lines
    assert_finished(out, expected)


def test_another_text_does_not_spoil_the_run(tmp_path, out, monkeypatch):
    """The samples of the unfinished run stay what they are."""
    source = save_chat_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    options = {"dataset": tmp_path / "text.txt", "num_samples": 4, "seqlen": 32}
    gptq(source, tmp_path / "expected", **options)
    stop_after_layers(monkeypatch, 1, lambda: gptq(source, out, **options))
    for change in ({"num_samples": 2}, {"seed": 1}, {"seqlen": 16}, {"dataset": IDS}):
        with pytest.raises(OutputError, match="calibration"):
            gptq(source, out, **{**options, **change})
    gptq(source, out, **options)
    assert contents(out) == contents(tmp_path / "expected")


def test_another_source_is_refused(tmp_path, out, monkeypatch):
    source = save_tiny(tmp_path / "model")
    stop_after_layers(monkeypatch, 1, lambda: gptq(source, out))
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(2))
    with pytest.raises(OutputError, match=r"source\.model\.safetensors: .* bytes"):
        gptq(source, out)


def test_a_finished_output_is_refused(source, out):
    gptq(source, out)
    before = contents(out.parent)
    with pytest.raises(OutputError, match="--overwrite"):
        gptq(source, out)
    assert contents(out.parent) == before


def test_two_runs_at_once(source, out, expected):
    refusals = []

    def second(line):
        with pytest.raises(OutputError, match="another run") as refusal:
            gptq(source, out, overwrite=len(refusals) > 0)
        refusals.append(refusal.value)

    gptq(source, out, announce=second)
    assert refusals
    assert_finished(out, expected)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "1", '{"a": 1}', '{"identity": [], "layers": []}', '{"identity": {}, "layers": [1]}',
     '{"identity": {}, "layers": {}}', '{"identity": {}, "layers": [{}]}', "[" * 10**5],
)  # fmt: skip
def test_job_that_cannot_be_read(source, out, expected, text):
    job_of(out).mkdir()
    (job_of(out) / "job.json").write_text(text)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"job\.json.*--overwrite"):
            gptq(source, out)
    assert names(out.parent) == [".out.job"] and (job_of(out) / "job.json").read_text() == text
    if text == "null":
        gptq(source, out, overwrite=True)
        assert_finished(out, expected)


# --redo


def test_redo_with_another_damping(source, out, expected, unfinished):
    """The layer that is named, and those behind it; what is before it keeps its bytes."""
    unfinished(3)
    lines = []
    report = gptq(source, out, redo=r".*layers\.1\..*up_proj", options={"damping": 0.2}, announce=lines.append)
    assert f"going on from layer 2 of {LAYERS}" in lines
    dampings = {layer["name"].split(".")[2]: layer["damping"] for layer in report.layers}
    assert dampings == {"0": 0.03, "1": 0.2, "2": 0.2} and len(report.layers) == 7 * LAYERS
    changed = {"0": False, "1": False, "2": False}
    before, after = stored_tensors(source.with_name("expected")), stored_tensors(out)
    for name in after:
        if name.endswith("_packed"):
            changed[name.split(".")[2]] |= not same_bits(before[name], after[name])
    assert changed == {"0": False, "1": True, "2": True}


def test_redo_of_the_same_gives_the_same(source, out, expected, unfinished):
    unfinished(3)
    assert_goes_on(source, out, expected, 2, redo=r"model\.layers\.1\.self_attn\.k_proj")


def test_redo_with_other_samples(source, out, unfinished, monkeypatch):
    """Hidden states of the samples before are of no use."""
    again = {"redo": ".*layers.1", "dataset": IDS.flip(1), "num_samples": 4}
    unfinished(3)
    gptq(source, out, **again)
    short = out.with_name("short")
    stop_after_layers(monkeypatch, 1, lambda: gptq(source, short))
    gptq(source, short, **again)
    assert contents(out) == contents(short)


def test_redo_then_killed_then_gone_on(source, out, unfinished, monkeypatch):
    """The second run has changed what the job is: without --redo, its settings are those to go on with."""
    unfinished(3)
    again = {"options": {"damping": 0.2}}
    stop_after_layers(monkeypatch, 2, lambda: gptq(source, out, redo=".*layers.1", **again))
    with pytest.raises(OutputError, match="damping"):
        gptq(source, out)
    gptq(source, out, **again)
    whole = out.with_name("whole")
    stop_after_layers(monkeypatch, 1, lambda: gptq(source, whole))
    gptq(source, whole, redo=".*layers.1", **again)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(("pattern", "says"), [("nothing", "matches no"), ("(", "regular expression")])
def test_redo_that_names_no_finished_layer_is_refused(source, out, expected, unfinished, pattern, says):
    unfinished(2)
    with pytest.raises(UsageError, match=says):
        gptq(source, out, redo=pattern)
    assert_goes_on(source, out, expected, 3)


def test_redo_of_other_bits_is_refused(source, out, expected, unfinished):
    unfinished(2)
    with pytest.raises(OutputError, match="scheme"):
        gptq(source, out, redo=".*layers.1", scheme="W8A16")
    assert_goes_on(source, out, expected, 3)


# Nothing that was begun


def test_wrong_input_leaves_nothing(source, out, no_threads):
    for options in (
        {"dataset": IDS + 100}, {"dataset": "no-such.txt"}, {"seed": -1}, {"redo": "nothing"}, {"num_samples": 2.5},
        {"seqlen": "64"},
    ):  # fmt: skip
        with pytest.raises(LowbitError):
            gptq(source, out, **options)
        assert names(out.parent) == []
    no_threads("lowbit-staged-pass")


def test_nan_in_the_middle(tmp_path, out, no_threads):
    """Found when its layer comes; what was done until then stays, and the forward passes of the layer do not."""
    source = save_tiny(tmp_path / "model")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0].fill_(torch.nan))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors holds 64 NaN"):
        gptq(source, out)
    assert not out.exists() and len(layer_files(out)) == 1
    no_threads("lowbit-staged-pass")


OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nan_outside_of_the_layers_is_found_at_once(tmp_path, out, name):
    source = save_tiny(tmp_path / "model")
    edit_tensors(source, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(InputError, match=name):
        gptq(source, out)
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("name", [*OUTSIDE[:2], "model.layers.1.input_layernorm.weight"])
def test_missing_tensor(tmp_path, out, name):
    source = save_tiny(tmp_path / "model")
    edit_tensors(source, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"{name} is not in"):
        gptq(source, out)
    assert not out.exists()


def test_failure_in_a_layer_ends_its_passes(source, out, no_threads, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "spy", None)
    monkeypatch.setattr(spy_quantizer, "quantize", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(source, out, dataset=IDS, **spy_quantizer.install())
    no_threads("lowbit-staged-pass")


def test_output_that_is_the_folder_we_are_in(source, tmp_path, monkeypatch):
    """Another folder would take its place, and this process would be in one that is no more."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="runs in"):
        gptq(source, ".")
    assert contents(tmp_path) == {"here": b""}
