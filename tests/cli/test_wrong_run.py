"""What a new user gets wrong when a model runs: devices, texts, and tensors that do not belong to it."""

import io
import shutil

import pytest
import torch
from folders import edit_tensors, read_json, save_tokenizer, write_json
from models import save_tiny


@pytest.mark.parametrize(
    ("command", "options"),
    [("generate", ["--prompt", "x"]), ("eval", ["--num-tokens", "9"]), ("chat", [])],
    ids=["generate", "eval", "chat"],
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
