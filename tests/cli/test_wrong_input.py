"""What a new user gets wrong: one clear line, exit code 1 or 2, and nothing half-made."""

import errno
import io
import os
import shutil

import pytest
import torch
from folders import (
    contents,
    edit_config,
    edit_tensors,
    read_json,
    save_chat_model,
    save_tokenizer,
    write_json,
)
from models import save_tiny

INDEX = "model.safetensors.index.json"
BAD = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def refused(cli, tmp_path):
    """refused(code, *arguments, says=[...]): exactly one line, the code, the words, and tmp_path as it was."""

    def check(code, *arguments, says=()):
        before = contents(tmp_path).keys()
        outcome = cli(*arguments)
        lines = outcome.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("lowbit: error: "), outcome
        assert outcome.code == code, outcome
        assert len(lines[0]) < 600
        for word in says if isinstance(says, list | tuple) else [says]:
            assert str(word) in lines[0], lines[0]
        assert contents(tmp_path).keys() <= before
        return lines[0]

    return check


@pytest.fixture
def wrong_usage(cli, tmp_path):
    """Options that the parser itself refuses: usage lines are fine, a traceback is not."""

    def check(*arguments, says):
        before = contents(tmp_path).keys()
        outcome = cli(*arguments)
        assert outcome.code == 2 and "Error" in outcome.err and "Traceback" not in outcome.err, outcome
        assert says in outcome.err
        assert contents(tmp_path).keys() == before

    return check


@pytest.fixture
def source(tmp_path, chat_model):
    """A model of its own for each test, to be damaged."""
    return shutil.copytree(chat_model, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return save_chat_model(tmp_path / "model", max_shard_size="60KB")


@pytest.fixture
def quantize(refused, tmp_path):
    """quantize(model, *options, says=..., code=1) is refused."""

    def check(model, *options, says=(), code=1):
        return refused(code, "quantize", model, "-o", tmp_path / "out", *options, says=says)

    return check


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


def test_nothing_that_says_which_model(refused, tmp_path, source):
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


def test_already_quantized(quantize, quantized):
    quantize(quantized, says=["quantized already", "compressed-tensors", str(quantized)])


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
        (["--bits", "5"], ["5", "2, 3, 4, 8"]),
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


@pytest.mark.parametrize(
    ("command", "options"),
    [("generate", ["--prompt", "x"]), ("eval", []), ("chat", [])],
    ids=lambda v: v[0] if v else "",
)
class TestRunning:
    """What generate, eval and chat have in common."""

    def test_wrong_dtype(self, refused, source, command, options):
        refused(2, command, source, *options, "--dtype", "int4", says=["int4", "bfloat16"])

    @pytest.mark.parametrize("model", ["chat_model", "quantized"])
    def test_unknown_backend(self, refused, request, monkeypatch, command, options, model):
        """Of a model that is not quantized too: nothing would run on it."""
        monkeypatch.setattr("sys.stdin", io.StringIO("!exit\n"))
        model = request.getfixturevalue(model)
        refused(2, command, model, *options, "--backend", "abacus", says=["abacus", "torch_cpu"])

    def test_device_that_is_not_there(self, refused, quantized, command, options):
        if torch.cuda.is_available():
            pytest.skip("has a GPU")
        refused(1, command, quantized, *options, "--device-map", "cuda")

    def test_device_that_does_not_exist(self, refused, quantized, command, options):
        refused(1, command, quantized, *options, "--device-map", "abacus", says="abacus")

    def test_no_tokenizer(self, refused, tmp_path, command, options):
        refused(1, command, save_tiny(tmp_path / "model"), *options, says=["tokenizer", tmp_path / "model"])


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


@pytest.mark.parametrize("call", ["os.pwrite", "os.fsync", "shutil.copyfile"])
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


# Text


def test_empty_prompt(refused, quantized):
    refused(1, "generate", quantized, "--prompt", "", says="prompt is empty")


def test_prompt_that_is_no_text(cli, quantized):
    """Bytes of the command line that are not UTF-8 arrive like this: refused or replaced, but no traceback."""
    assert cli("generate", quantized, "--prompt", "a\udcffb", "--max-new-tokens", "2").code in (0, 1)


def test_prompt_longer_than_the_context(refused, quantized):
    refused(1, "generate", quantized, "--prompt", "!" * 300, "--max-new-tokens", "1", says=["300", "256", "context"])


def test_more_new_tokens_than_the_context(refused, quantized):
    refused(1, "generate", quantized, "--prompt", "!!", "--max-new-tokens", "300", says=["300", "--max-new-tokens"])


def test_name_of_a_text_that_is_too_long(refused, quantized):
    refused(1, "eval", quantized, "--dataset", "x" * 300, says="no such text file")


def test_seed_that_is_too_large(cli, quantized):
    outcome = cli("generate", quantized, "--prompt", "x", "--max-new-tokens", "2", "--seed", 10**30)
    assert outcome.code in (1, 2) and "seed" in outcome.err


def test_temperature_that_divides_to_infinity(cli, quantized):
    """As good as greedy, or refused."""
    options = ["--prompt", "x", "--max-new-tokens", "2", "--temperature", "1e-40"]
    assert cli("generate", quantized, *options).code in (0, 1, 2)


def test_text_that_is_too_short(refused, quantized, tmp_path):
    (tmp_path / "short.txt").write_text("")
    refused(1, "eval", quantized, "--dataset", tmp_path / "short.txt", says="too few")


def test_text_that_is_no_text(refused, quantized, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    refused(1, "eval", quantized, "--dataset", tmp_path / "binary", says="UTF-8")


def test_no_such_text(refused, quantized):
    refused(1, "eval", quantized, "--dataset", "no-such.txt", says=["no-such.txt", "stdlib"])


def test_data_set_that_cannot_be_reached(refused, quantized):
    refused(1, "eval", quantized, "--dataset", "nobody-at-all/no-such-data", says="nobody-at-all/no-such-data")


def test_tokenizer_of_another_model(refused, tmp_path):
    """Its tokens do not exist in the model: an index error deep inside otherwise."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    small = save_tiny(tmp_path / "small", vocab_size=100)
    save_tokenizer(small)
    refused(1, "eval", small, "--dataset", tmp_path / "text.txt", says="vocabulary")
    refused(1, "generate", small, "--prompt", "the fox", "--max-new-tokens", "2", says="vocabulary")


def test_reference_with_another_vocabulary(refused, quantized, tmp_path):
    save_tiny(tmp_path / "other", vocab_size=500)
    (tmp_path / "text.txt").write_text("the quick brown fox")
    line = refused(1, "eval", quantized, "--reference", tmp_path / "other", "--dataset", tmp_path / "text.txt")
    assert "500" in line and "320" in line


@pytest.mark.parametrize("which", ["model", "reference"])
def test_model_that_computes_nan(refused, source, quantized, tmp_path, which):
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    (tmp_path / "text.txt").write_text("the quick brown fox")
    models = [source] if which == "model" else [quantized, "--reference", source]
    refused(1, "eval", *models, "--dataset", tmp_path / "text.txt", says="NaN")


def test_sampling_from_nan(cli, source):
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    outcome = cli("generate", source, "--prompt", "x", "--max-new-tokens", "2", "--temperature", "1")
    assert outcome.code == 1 and outcome.err.startswith("lowbit: error:") and "NaN" in outcome.err


# Loading is strict


def some_tensors(quantized: bool) -> list[str]:
    base = "model.layers.1.mlp.up_proj."
    packed = [base + part for part in ("weight_packed", "weight_scale", "weight_shape")]
    dense = ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    return [*dense, *(packed if quantized else [base + "weight"])]


@pytest.mark.parametrize("kind", ["chat_model", "quantized"])
def test_missing_tensor(refused, request, tmp_path, kind):
    original = request.getfixturevalue(kind)
    for number, name in enumerate(some_tensors(kind == "quantized")):
        folder = shutil.copytree(original, tmp_path / str(number))
        edit_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        refused(1, "generate", folder, "--prompt", "x", says=name)


@pytest.mark.parametrize("kind", ["chat_model", "quantized"])
def test_extra_tensor(refused, request, tmp_path, kind):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.surprise": torch.ones(3)}))
    refused(1, "generate", folder, "--prompt", "x", says=["model.layers.1.surprise"])


@pytest.mark.parametrize("kind", ["chat_model", "quantized"])
def test_tensor_of_another_shape(refused, request, tmp_path, kind):
    original = request.getfixturevalue(kind)
    for number, name in enumerate(some_tensors(kind == "quantized")):
        folder = shutil.copytree(original, tmp_path / str(number))
        edit_tensors(folder, lambda tensors, name=name: tensors.update({name: tensors[name][:-1].clone()}))
        refused(1, "generate", folder, "--prompt", "x", says=name)


def test_packed_width_of_other_bits(refused, quantized, tmp_path):
    """The config says 8 bits, the weights have 4."""
    folder = shutil.copytree(quantized, tmp_path / "model")
    config = read_json(folder / "config.json")
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8
    write_json(folder / "config.json", config)
    refused(1, "generate", folder, "--prompt", "x", says="weight_packed")
