"""`lowbit quantize --method gptq`: what it prints, what it reads, what it refuses, and how it is stopped."""

import json
import os
import signal

import pytest
import torch
from folders import contents, edit_tensors, read_json, save_chat_model, stored_tensors
from models import relative_error, save_tiny, tiny_model
from paused import start_paused
from safetensors.torch import save_file

import lowbit

pytestmark = pytest.mark.slow

SMALL = ["--method", "gptq", "--group-size", 32, "--num-samples", 6, "--seqlen", 32]


@pytest.fixture
def ids_file(tmp_path):
    ids = torch.randint(3, 320, (6, 32))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    return tmp_path / "ids.safetensors"


@pytest.fixture
def gptq_refused(refused, chat_model, text_file, tmp_path):
    """gptq_refused(code, *options, says=..., model=..., dataset=...): one line, and nothing is left."""

    def check(code, *options, says=(), model=chat_model, dataset=text_file):
        data = [] if dataset is None else ["--dataset", dataset]
        refused(code, "quantize", model, "-o", tmp_path / "out", *SMALL, *data, *options, says=says)

    return check


# What it prints


def test_text(done, chat_model, text_file, tmp_path):
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", text_file)
    assert "calibrating with 6 samples, 192 tokens: text.txt" in outcome.err
    for words in (
        "calibrated with 6 samples, 192 tokens",
        "text.txt",
        "peak memory",
        "error of rounding, in outputs, 0.",
    ):
        assert words in outcome.out
    shown = outcome.out.split("largest errors of rounding")[1].split("left alone")[0].splitlines()
    rows = [row.split() for row in shown if "W4A16-G32" in row]  # a name may go on in the next line
    report = read_json(tmp_path / "out" / "lowbit_report.json")
    worst = sorted(report["layers"], key=lambda layer: -layer["rounding_error"])[:5]
    for (name, _, *numbers), layer in zip(rows, worst, strict=True):
        errors = [f"{layer[key]:.4f}" for key in ("rounding_error", "output_error_to_original")]
        assert layer["name"].startswith(name) and numbers == ["192", *errors]
    model = lowbit.load(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_json(done, chat_model, text_file, tmp_path):
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", text_file, "--json")
    report = json.loads(outcome.out, parse_constant=pytest.fail)
    assert report == read_json(tmp_path / "out" / "lowbit_report.json")
    assert report["calibration"] == {"source": "text.txt", "samples": 6, "tokens": 192}
    assert report["recipe"]["method"] == "gptq" and report["recipe"]["options"]["damping"] == 0.03
    assert len(report["layers"]) == report["quantized_tensors"] == 14
    for layer in report["layers"]:
        assert layer["tokens"] == 192 and 0 < layer["output_error"] < 1 and layer["objective"] and not layer["note"]
    assert [layer["layer"] for layer in report["decoder_layers"]] == [0, 1]


def test_cold_experts_are_shown(done, tmp_path, ids_file):
    source = save_tiny(tmp_path / "moe", "mixtral", vocab_size=320)
    outcome = done("quantize", source, "-o", tmp_path / "out", *SMALL, "--dataset", ids_file)
    layers = read_json(tmp_path / "out" / "lowbit_report.json")["layers"]
    cold = [layer for layer in layers if layer["note"].startswith("cold expert")]
    assert cold  # 192 tokens, two experts each, of four
    shown = " ".join(outcome.out.split())
    for layer in cold:
        assert f"{layer['name']} expert {layer['expert']}: {layer['note']}" in shown


def test_options(done, chat_model, ids_file, tmp_path):
    options = ["--option", "damping=0.1", "--option", "sweeps=1", "--option", "order=none", "--scale-search", "minmax"]
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", ids_file, *options, "--json")
    report = json.loads(outcome.out)
    expected = {"damping": 0.1, "sweeps": 1, "order": "none", "scale_search": "minmax"}
    assert report["recipe"]["options"].items() >= expected.items()
    assert {layer["damping"] for layer in report["layers"]} == {0.1}


def test_gptq_takes_all_options_of_quantize(done, chat_model, ids_file, tmp_path):
    options = [
        "--bits", 8, "--asym", "--lm-head", "--lm-head-scheme", "W8A16-G32", "--max-memory", "1MB", "--seed", 3,
        "--override", ".*up_proj=W4A16-G16", "--ignore", ".*o_proj", "--max-shard-size", "50KB",
    ]  # fmt: skip
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", ids_file, *options, "--json")
    schemes = {layer["name"]: layer["scheme"] for layer in json.loads(outcome.out)["layers"]}
    assert len(schemes) == 13 and schemes["lm_head.weight"] == "W8A16-G32"
    assert schemes["model.layers.1.mlp.up_proj.weight"] == "W4A16-G16"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    ids = stored_tensors(tmp_path)["input_ids"]
    with torch.no_grad():
        wanted = tiny_model(vocab_size=320, max_position_embeddings=256)(ids).logits
        assert relative_error(lowbit.load(tmp_path / "out")(ids).logits, wanted) < 0.1


# What it reads


def test_text_written_by_the_model(done, chat_model, tmp_path):
    for name in ("out", "again"):
        outcome = done("quantize", chat_model, "-o", tmp_path / name, *SMALL, "--dataset", "self")
        assert "192 tokens" in outcome.out and "model" in outcome.out
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_no_data_set_that_can_be_reached(done, chat_model, tmp_path):
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL)
    assert "sampled from the model itself" in " ".join(outcome.err.split())


def test_other_data_gives_other_weights(done, chat_model, text_file, ids_file, tmp_path):
    for name, data in (("text", text_file), ("ids", ids_file)):
        done("quantize", chat_model, "-o", tmp_path / name, *SMALL, "--dataset", data)
    texts, ids = stored_tensors(tmp_path / "text"), stored_tensors(tmp_path / "ids")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    assert not torch.equal(texts[name], ids[name])


def test_dry_run(done, chat_model, tmp_path):
    outcome = done("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dry-run")
    assert "nothing was written" in outcome.out and list(tmp_path.iterdir()) == []


# What it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--option", "damping=lots"], ["damping", "lots", "from 0.0 to 10.0"]),
        (["--option", "damping=-1"], ["damping", "-1"]),
        (["--option", "damping=nan"], ["damping", "nan"]),
        (["--option", "sweeps=1.5"], ["sweeps", "1.5", "an integer"]),
        (["--option", "shrink=1"], ["shrink", "damping"]),
        (["--option", "damping"], ["damping", "NAME=VALUE"]),
        (["--option", "order=up"], ["order", "up", "group, none"]),
        (["--scale-search", "mse"], ["scale_search", "mse", "columns"]),
        (["--method", "gptqq"], ["gptqq", "rtn, gptq"]),
        (["--redo", "("], ["(", "regular expression"]),
        (["--max-memory", "lots"], ["lots", "5GB"]),
        (["--seed", "-1"], ["seed", "-1"]),
    ],
    ids=str,
)
def test_wrong_options(gptq_refused, options, says):
    gptq_refused(2, *options, says=says)


def test_sequences_of_one_token(wrong_usage, chat_model, tmp_path):
    wrong_usage("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--seqlen", 1, says="--seqlen")
    wrong_usage("quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--num-samples", 0, says="--num-samples")


def test_tied_output_embedding(gptq_refused, tmp_path):
    source = save_chat_model(tmp_path / "tied", tie_word_embeddings=True)
    gptq_refused(2, "--lm-head", model=source, says="tied")


def test_ids_of_another_tokenizer(gptq_refused, tmp_path):
    save_file({"input_ids": torch.full((2, 32), 320)}, tmp_path / "ids.safetensors")
    gptq_refused(1, dataset=tmp_path / "ids.safetensors", says=["ids.safetensors", "320", "vocabulary"])


def test_data_that_is_not_there(gptq_refused, tmp_path):
    gptq_refused(1, dataset=tmp_path / "no.txt", says="no.txt")
    gptq_refused(1, dataset=tmp_path / "no.safetensors", says="no.safetensors")
    gptq_refused(1, dataset="nobody-at-all/no-such-data", says="nobody-at-all/no-such-data")


def test_missing_tensors(gptq_refused, source):
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        taken = {}
        edit_tensors(source, lambda tensors, name=name, taken=taken: taken.update({name: tensors.pop(name)}))
        gptq_refused(1, model=source, says=[name, "is not in"])
        edit_tensors(source, lambda tensors, taken=taken: tensors.update(taken))


def test_nan_outside_of_the_layers(gptq_refused, source):
    edit_tensors(source, lambda tensors: tensors["lm_head.weight"][7, :3].fill_(torch.nan))
    gptq_refused(1, model=source, says=["lm_head.weight", "3 NaN"])


def test_nan_in_a_layer(cli, source, text_file, tmp_path):
    """What was done before stays, hidden; it is removed when the run starts anew with a sound model."""
    command = ["quantize", source, "-o", tmp_path / "out", *SMALL, "--dataset", text_file]
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name][0, 0].fill_(torch.inf))
    outcome = cli(*command)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("lowbit: error: ") and name in last and "1 NaN or infinite" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.job", "model", "text.txt"]
    edit_tensors(source, lambda tensors: tensors[name][0, 0].fill_(0))
    outcome = cli(*command)
    assert outcome.code == 1 and "source.model.safetensors" in outcome.err and "--overwrite" in outcome.err
    assert cli(*command, "--overwrite").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_full_disk(cli, chat_model, text_file, tmp_path, monkeypatch):
    """The file system has no room for the second layer; when it has, the run goes on."""
    from lowbit.checkpoint import writer

    def reserve(descriptor, offset, size, real=os.posix_fallocate):
        if len(list(tmp_path.glob(".out.job/layer-*.safetensors"))) == 1:
            raise OSError(28, "No space left on device")
        real(descriptor, offset, size)

    command = ["quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", text_file]
    with monkeypatch.context() as patched:
        patched.setattr(writer.os, "posix_fallocate", reserve)
        outcome = cli(*command)
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert last.startswith("lowbit: error: ") and "No space left" in last
    assert not (tmp_path / "out").exists()
    outcome = cli(*command)
    assert outcome.code == 0 and "going on from layer 2 of 2" in outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


# How it is stopped


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_and_gone_on_with(done, chat_model, text_file, tmp_path):
    """As any run: a line that says so, exit code 1. What was finished stays, and the same command goes on from it."""
    arguments = ["quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", text_file]
    process = start_paused(*arguments, method="gptq", call=5)  # the second layer: a layer has four sets of inputs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if not line.startswith("calibrating")]
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    assert len(lines) == 2 and lines[1].startswith("lowbit: interrupted"), err
    assert lines[0] == "1 finished layer(s) are kept: the same command goes on from there"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.job", "text.txt"]
    outcome = done(*arguments)
    assert "going on from layer 2 of 2" in outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


def test_a_finished_output_is_not_touched(refused, done, chat_model, ids_file, tmp_path):
    command = ["quantize", chat_model, "-o", tmp_path / "out", *SMALL, "--dataset", ids_file]
    done(*command)
    before = contents(tmp_path)
    refused(1, *command, says=["exists already", "--overwrite"])
    assert contents(tmp_path) == before
    done(*command, "--overwrite")
    assert contents(tmp_path / "out") == {k.removeprefix("out/"): v for k, v in before.items() if k.startswith("out/")}


def test_other_settings_are_refused(cli, refused, done, source, ids_file, tmp_path, monkeypatch):
    from lowbit.quantization import run

    command = ["quantize", source, "-o", tmp_path / "out", *SMALL, "--dataset", ids_file]
    with monkeypatch.context() as patched:  # everything is done but for the output
        patched.setattr(run, "write_checkpoint", lambda *args: (_ for _ in ()).throw(lowbit.errors.OutputError("no")))
        assert cli(*command).code == 1
    for change, says in ((["--bits", 8], "recipe.scheme"), (["--num-samples", 4], "calibration.num_samples: 6 then")):
        outcome = cli(*command, *change)
        last = outcome.err.splitlines()[-1]
        assert outcome.code == 1 and last.startswith("lowbit: error:") and says in last and "--overwrite" in last
    outcome = done(*command, "--redo", r".*layers\.1", "--option", "damping=0.2")
    assert "going on from layer 2 of 2" in outcome.err
    layers = read_json(tmp_path / "out" / "lowbit_report.json")["layers"]
    assert {(layer["name"].split(".")[2], layer["damping"]) for layer in layers} == {("0", 0.03), ("1", 0.2)}
