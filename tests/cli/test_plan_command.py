"""`lowbit plan` knows to the byte what `lowbit quantize` writes, for a folder or a repository it does not download."""

from itertools import count

import pytest
from folders import data_bytes, save_random_llama
from hub import Repo, running_hub
from huggingface_hub import constants
from models import save_tiny

import lowbit
from lowbit.errors import InputError, UsageError
from lowbit.quantization import forecast

CASES = {
    "llama": {},
    "qwen3": {"scheme": "W4A16_ASYM-G32"},  # tied embeddings
    "gemma2": {"scheme": "W8A16"},
    "phi3": {"scheme": "W3A16-G32"},
    "gpt2": {"overrides": [(".*mlp", "W8A16-G32")]},
    "gpt_neox": {"scheme": "W2A16-CHANNEL"},
    "mixtral": {"scheme": "W4A16-G32", "format": "gptq"},
    "qwen2_moe": {"scheme": "W4A16_ASYM-G32", "format": "awq"},
    "qwen3_moe": {"scheme": "W4A16-G16", "ignore": [".*q_proj"]},
    "gpt_oss": {"scheme": "W4A16-G32"},
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_are_written(name, tmp_path):
    """Files in one shard or several, tensors, bits of a weight, what is quantized and what is not."""
    source, out = save_tiny(tmp_path / "dense", name), tmp_path / "out"
    options = {"max_shard_size": "40kB", **CASES[name]}
    found = lowbit.plan(source, **options)
    report = lowbit.quantize(source, out, **options)
    assert found.file_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert found.output_bytes == report.output_bytes == data_bytes(out)
    assert found.bits_per_weight == report.bits_per_weight
    assert (found.skipped, found.fallbacks) == (report.left_alone, report.fallbacks)
    stored = {base: (weight.scheme.name, weight.nbytes) for base, weight in _stored(out).items()}
    assert {module["name"]: (module["scheme"], module["bytes"]) for module in found.modules} == stored
    assert found.engines and found.engines[0]["engine"] == "lowbit" and found.engines[0]["ok"]


def _stored(folder):
    from lowbit.checkpoint import CheckpointReader
    from lowbit.folders.stored import StoredWeights

    return StoredWeights(CheckpointReader(folder)).weights


def test_memory_and_time_are_of_the_right_size(tmp_path, monkeypatch):
    """A matrix of 268 MB has to be in memory, and one of a kilobyte has not. What is timed on this machine takes
    as long each time: it may be busy."""
    monkeypatch.setattr(forecast.time, "perf_counter", count(step=0.01).__next__)
    large = lowbit.plan(save_random_llama(tmp_path / "large", 512, 512, 1, vocabulary=131072))
    small = lowbit.plan(save_random_llama(tmp_path / "small", 512, 512, 1))
    assert 1.3e8 < large.peak_ram_bytes - small.peak_ram_bytes < 6e8
    calibrated = lowbit.plan(tmp_path / "small", method="gptq", num_samples=64, seqlen=512)
    longer = lowbit.plan(tmp_path / "small", method="gptq", num_samples=640, seqlen=512)
    assert calibrated.seconds > small.seconds and longer.seconds > calibrated.seconds
    assert longer.peak_ram_bytes > calibrated.peak_ram_bytes
    assert calibrated.disk_bytes > small.disk_bytes == small.file_bytes


def test_engines(chat_model):
    """The reason of an engine that refuses names a module."""
    engines = {entry["engine"]: entry for entry in lowbit.plan(chat_model, scheme="W3A16_ASYM-G32").engines}
    assert engines["lowbit"]["ok"] and not engines["SGLang"]["ok"]
    assert "model.layers.0" in engines["SGLang"]["reason"]
    assert engines["vLLM"]["compute_capability"] == "7.5" and set(engines["vLLM"]["tensor_parallel"]) == set("1248")


def test_printed(done, json_of, chat_model):
    shown = done("plan", chat_model, "--bits", "4", "--group-size", "32").out
    assert "W4A16-G32" in shown and "vLLM" in shown and "peak memory" in shown and "output embedding" in shown
    data = json_of("plan", chat_model, "--bits", "4", "--group-size", "32")
    assert set(data) >= {"output_bytes", "bits_per_weight", "peak_ram_bytes", "modules", "skipped", "engines"}
    again = json_of("quantize", chat_model, "--bits", "4", "--group-size", "32", "--dry-run")
    assert {**again, "seconds": 0, "peak_ram_bytes": 0} == {**data, "seconds": 0, "peak_ram_bytes": 0}


def test_wrong_input(refused, chat_model, tmp_path):
    refused(2, "plan", chat_model, "--scheme", "W7A16", says=["bits is 7"])
    refused(1, "plan", tmp_path / "nothing", says=["no such model folder"])
    refused(1, "plan", chat_model, "--ignore", ".*", says=["nothing to quantize"])
    with pytest.raises(UsageError, match="size 'many' is not understood"):
        lowbit.plan(chat_model, max_shard_size="many")


def test_a_repository_is_not_downloaded(monkeypatch, tmp_path, chat_model):
    """Config and headers only, by range requests; the same plan as of the folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = save_random_llama(tmp_path / "model", 128, 256, 4)
    with running_hub(monkeypatch) as hub:
        hub.repos["org/tiny"] = Repo(False, {file.name: file.read_bytes() for file in source.iterdir()})
        found, local = lowbit.plan("org/tiny"), lowbit.plan(source)
        assert set(hub.sent) == {"config.json", "model.safetensors"}
        assert hub.sent["model.safetensors"] < (source / "model.safetensors").stat().st_size / 5
        assert (found.modules, found.file_bytes, found.skipped) == (local.modules, local.file_bytes, local.skipped)
        with pytest.raises(InputError, match="org/none"):
            lowbit.plan("org/none")
