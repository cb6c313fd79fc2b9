"""What a new user gets wrong: one clear line, exit code 1 or 2, and nothing half-made."""

import errno
import os
import shutil

import pytest
import torch
from folders import (
    contents,
    edit_config,
    edit_tensors,
    read_json,
    write_json,
)
from models import save_tiny

INDEX = "model.safetensors.index.json"
BAD = "model.layers.1.mlp.up_proj.weight"


# The model


@pytest.mark.parametrize("command", ["quantize", "inspect", "generate", "eval", "chat"])
@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "nothing", "/nothing/here"])
def test_no_such_folder(refused, tmp_path, command, name):
    options = {"quantize": ["-o", tmp_path / "out"], "generate": ["--prompt", "x"]}.get(command, [])
    refused(1, command, name, *options, says=[name, "no such model folder"])


def test_not_in_the_cache_and_offline(quantize):
    quantize("nobody-at-all/no-such-model", says=["nobody-at-all/no-such-model", "not a folder", "Hub"])


def test_a_file_is_no_folder(quantize, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    quantize(tmp_path / "model.safetensors", says="no such model folder")


@pytest.mark.parametrize("command", ["quantize", "inspect", "generate", "eval", "chat"])
def test_not_a_model(refused, tmp_path, command):
    (tmp_path / "photos").mkdir()
    options = {"quantize": ["-o", tmp_path / "out"], "generate": ["--prompt", "x"]}.get(command, [])
    refused(1, command, tmp_path / "photos", *options, says=[tmp_path / "photos"])


@pytest.mark.parametrize(
    "name", ["x" * 300, "~nobody-of-that-name/model", "a b/c", "a/", "a\\b/c", "-/-", "con[/]fuse"]
)
def test_names_that_no_model_has(refused, name):
    refused(1, "inspect", "--model", name)


def test_missing_or_double_model_is_refused(refused, tmp_path, source):
    refused(2, "quantize", "-o", tmp_path / "out", says="expected one MODEL")
    refused(2, "inspect", source, "--model", source, says="expected one MODEL")


READERS = [("quantize", "-o", "out"), ("inspect",), ("generate", "--prompt", "x")]


@pytest.fixture(params=READERS, ids=lambda arguments: arguments[0])
def reading(request, refused, tmp_path, monkeypatch):
    """reading(model, says=...): each command that reads weights refuses them."""
    monkeypatch.chdir(tmp_path)
    command, *options = request.param
    return lambda model, says=(): refused(1, command, model, *options, says=says)


def test_truncated_shard(reading, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    reading(sharded, says=shard.name)


def test_empty_file(reading, source):
    (source / "model.safetensors").write_bytes(b"")
    reading(source, says="model.safetensors")


def test_missing_shard(reading, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    reading(sharded, says=shard.name)


@pytest.mark.parametrize("place", ["../stolen.safetensors", "{absolute}", "..\\stolen.safetensors"])
def test_index_that_points_outside(reading, sharded, tmp_path, place):
    """Also where the shard is whole and fits: a stranger's index must not choose which files are opened."""
    index = read_json(sharded / INDEX)
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "stolen.safetensors")
    place = place.format(absolute=tmp_path / "stolen.safetensors")
    index["weight_map"] = {n: place if f == shard.name else f for n, f in index["weight_map"].items()}
    write_json(sharded / INDEX, index)
    reading(sharded, says=[INDEX, "stolen"])


def test_pickle_weights_only(reading, source):
    (source / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model.bin")
    reading(source, says="safetensors")


def test_pickle_weights_only_are_named(quantize, source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    quantize(source, says=["pytorch_model.bin", "pickle", "save_pretrained"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(quantize, tmp_path, value, dtype):
    folder = save_tiny(tmp_path / "model", dtype=dtype)

    def damage(tensors):
        tensors[BAD][2, 5:8] = value

    edit_tensors(folder, damage)
    quantize(folder, says=[BAD, "model.safetensors", " 3 ", f"{96 * 64:,}"])


def test_the_shard_that_holds_nan_is_named(quantize, sharded):
    from safetensors.torch import load_file, save_file

    shard = sharded / read_json(sharded / INDEX)["weight_map"]["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    quantize(sharded, says=["model.norm.weight", shard.name, " 64 "])


def test_infinities_that_cancel(quantize, source):
    def damage(tensors):
        tensors[BAD][0, 0], tensors[BAD][0, 1] = torch.inf, -torch.inf

    edit_tensors(source, damage)
    quantize(source, says=[BAD, " 2 "])


@pytest.mark.parametrize("said", ["x", 5, [1], True], ids=str)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_quantization_config_that_is_no_object(refused, source, tmp_path, command, said):
    edit_config(source, text_config={"model_type": "llama", "quantization_config": said})
    refused(1, command, source, *(["-o", tmp_path / "out"] if command == "quantize" else []),
            says=["quantization_config", "expected an object"])  # fmt: skip


def test_quantized_by_a_method_that_nothing_here_reads(quantize, source):
    edit_config(source, quantization_config={"quant_method": "hqq"})
    quantize(source, says=["quantized already", "hqq", str(source)])


# config.json


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "nonsense"])
def test_config_that_is_no_object(reading, source, text):
    (source / "config.json").write_text(text)
    reading(source, says="config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nonsense"},
        {"model_type": None, "architectures": None},
        {"model_type": 5},
        {"architectures": "LlamaForCausalLM", "model_type": "nonsense"},
        {"hidden_size": "large"},
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**6 + 0.5},
        {"hidden_act": "nonsense"},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": "nonsense"}},
        {"quantization_config": {}},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_config_that_makes_no_sense(refused, tmp_path, source, changes, command):
    edit_config(source, **changes)
    options = {"quantize": ["-o", tmp_path / "out"], "generate": ["--prompt", "x"]}[command]
    refused(1, command, source, *options)


def test_architecture_that_is_no_name(cli, source, tmp_path):
    """The model type says enough."""
    edit_config(source, architectures=[5])
    assert cli("quantize", source, "-o", tmp_path / "out").code in (0, 1)


def test_architecture_that_transformers_does_not_know(quantize, source):
    edit_config(source, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    quantize(source, says="nonsense")


def test_remote_code_is_not_run(quantize, source, tmp_path):
    proof = tmp_path / "proof"
    (source / "configuration_x.py").write_text(f"open({str(proof)!r}, 'w')\nclass X: pass\n")
    edit_config(source, model_type="x", auto_map={"AutoConfig": "configuration_x.X"})
    quantize(source, says="--trust-remote-code")
    assert not proof.exists()


def test_config_of_another_model(quantize, source):
    edit_config(source, hidden_size=128, head_dim=32)
    quantize(source, says=["has shape", "config"])


def test_tensor_that_is_missing(quantize, source):
    edit_tensors(source, lambda tensors: tensors.pop(BAD))
    quantize(source, says=[BAD, str(source)])


@pytest.mark.parametrize("broken", ["config_groups", "group_size", "num_bits", "strategy", "format", "targets"])
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_quantization_config_that_lacks_something(refused, tmp_path, quantized, broken, command):
    folder = shutil.copytree(quantized, tmp_path / "model")
    config = read_json(folder / "config.json")
    stored = config["quantization_config"]
    group = stored["config_groups"]["group_0"]
    for place in (stored, group, group["weights"]):
        place.pop(broken, None)
    write_json(folder / "config.json", config)
    refused(1, command, folder, *(["--prompt", "x"] if command == "generate" else []))


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bits", "7"], ["7", "2, 3, 4, 5, 6, 8"]),
        (["--group-size", "48"], ["48", "128"]),
        (["--group_size", "0"], ["group_size", "128"]),
        (["--scheme", "Q4_K_M"], ["Q4_K_M", "W4A16"]),
        (["--scheme", "W4A16", "--bits", "4"], ["--scheme", "--bits"]),
        (["--method", "magic"], ["magic", "rtn"]),
        (["--scale-search", "best"], ["best", "minmax, mse"]),
        (["--format", "gguf"], ["gguf", "compressed-tensors"]),
        (["--max-shard-size", "big"], ["big", "5GB"]),
        (["--max-shard-size", "0"], ["0", "5GB"]),
        (["--max-shard-size=-1GB"], ["-1GB"]),
        (["--ignore", "("], ["'('", "regular expression"]),
        (["--override", "mlp"], ["mlp", "REGEX=SCHEME"]),
        (["--override", "mlp=W9A16"], ["9"]),
        (["--override", "mlp=good"], ["good"]),
    ],
    ids=lambda value: value[0] + value[-1] if value[0].startswith("--") else "",
)
def test_option_that_cannot_work(quantize, source, options, says):
    quantize(source, *options, says=says, code=2)


@pytest.mark.parametrize(
    "options",
    [["--dataset", "nothing.txt"], ["--num-samples", "7"], ["--seqlen", "64"], ["--seed", "1"], ["--redo", "mlp"],
     ["--max-memory", "1GB"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_data_options_without_a_method_that_takes_data(quantize, source, options):
    quantize(source, *options, says=[options[0].strip("-").replace("-", "_"), "rtn", "gptq"], code=2)


@pytest.mark.parametrize("options", [["--ignore", "downproj"], ["--override", "downproj=W8A16"]], ids=lambda o: o[0])
def test_patterns_that_name_nothing(refused, source, tmp_path, options):
    refused(2, "quantize", source, "-o", tmp_path / "out", *options, says=["downproj", "nearest names are down_proj"])
    refused(2, "plan", source, *options, says=["downproj", "nearest names are down_proj"])


def test_a_calibration_file_that_is_not_there(quantize, source):
    quantize(source, "--method", "gptq", "--seqlen", "32", "--dataset", "nothing.txt", says=["nothing.txt"])


@pytest.mark.parametrize("command", ["quantize", "plan", "inspect", "verify"])
def test_a_revision_of_a_folder(refused, source, tmp_path, command):
    output = ["-o", tmp_path / "out"] if command == "quantize" else []
    refused(2, command, source, *output, "--revision", "v1.0", says=["v1.0", "folder"])


def test_no_output_folder(refused, source):
    refused(2, "quantize", source, says="-o")


def test_options_that_the_parser_refuses(wrong_usage, source, tmp_path):
    wrong_usage("quantize", source, "-o", tmp_path / "out", "--bits", "four", says="--bits")
    wrong_usage("quantize", source, "-o", tmp_path / "out", "--no-such-option", says="--no-such-option")
    wrong_usage("quantise", source, says="quantise")
    wrong_usage("generate", source, says="--prompt")
    wrong_usage("generate", source, "--prompt", "x", "--temperature", "-1", says="temperature")
    wrong_usage("generate", source, "--prompt", "x", "--max-new-tokens", "0", says="max-new-tokens")
    wrong_usage("eval", source, "--seqlen", "1", says="seqlen")


def test_no_layer_left(quantize, source):
    quantize(source, "--ignore", ".*", says=["nothing to quantize", "--ignore"])


# The output folder


def test_output_folder_exists(quantize, source, tmp_path, quantized):
    shutil.copytree(quantized, tmp_path / "out")
    before = contents(tmp_path / "out")
    quantize(source, says=[tmp_path / "out", "--overwrite"])
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_output_folder_of_something_else(quantize, source, tmp_path, options):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    quantize(source, *options, says=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_output_is_a_file(quantize, source, tmp_path):
    (tmp_path / "out").write_text("precious")
    quantize(source, "--overwrite", says="not a folder")


@pytest.mark.parametrize("place", ["", "sub", "sub/deeper", ".."])
def test_output_that_overlaps_the_model(refused, source, place):
    before = contents(source)
    refused(1, "quantize", source, "-o", source / place, "--overwrite", says="overlap")
    assert contents(source) == before


def test_output_name_that_is_too_long(refused, source, tmp_path):
    refused(1, "quantize", source, "-o", tmp_path / ("x" * 300), says="name too long")


def test_bad_model_leaves_no_parent_folders(refused, source, tmp_path):
    edit_tensors(source, lambda tensors: tensors[BAD].fill_(torch.nan))
    refused(1, "quantize", source, "-o", tmp_path / "new" / "deep" / "out", says=BAD)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_output_parent_is_read_only(refused, source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(1, "quantize", source, "-o", tmp_path / "locked" / "out", says=["cannot write", tmp_path / "locked"])


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_is_full_from_the_start(quantize, source, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    quantize(source, says=["No space left", "model.safetensors", "free"])


@pytest.mark.parametrize("call", ["os.pwrite", "os.fsync", "shutil.copyfileobj"])
def test_disk_fills_up_on_the_way(quantize, source, monkeypatch, call):
    monkeypatch.setattr(call, no_space)
    quantize(source, says=["No space left", "cannot write"])


def test_file_larger_than_the_system_allows(quantize, source):
    """The real thing, without a monkeypatch: a limit on file sizes stops the write as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        quantize(source, says="File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_source_that_goes_away_is_not_blamed_on_the_output(quantize, source, monkeypatch):
    from lowbit.checkpoint import CheckpointReader

    real = CheckpointReader.tensor

    def unplugged(self, name):
        (source / "model.safetensors").unlink(missing_ok=True)
        return real(self, name)

    monkeypatch.setattr(CheckpointReader, "tensor", unplugged)
    line = quantize(source, says=["No such file", source / "model.safetensors"])
    assert "cannot write" not in line
