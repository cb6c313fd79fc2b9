"""What the benchmarks share: the facts of a run, the random checkpoint they use, and where results go."""

import json
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "build" / "benchmarks"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def facts() -> dict:
    """Device, versions and date: in every result file."""
    versions = {}
    for package in ("torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **versions,
    }


def save(name: str, result: dict) -> None:
    """Write results/<name>.json and show it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"facts": facts(), **result}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    print(text)


def read_bandwidth(count: int = 2**26) -> float:
    """GB/s of a sum over `count` floats, which no cache holds, in all threads: the best of three."""
    memory = torch.ones(count)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / min(seconds) / 1e9


def timed(function, repeats: int = 3) -> float:
    """Median seconds of `repeats` calls after one to warm up."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def llama_1b(work: Path = WORK) -> Path:
    """A random bf16 checkpoint of the shapes of Llama-3.2-1B (2.5 GB), made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / "llama-3.2-1b-shapes"
    if not (folder / "model.safetensors").is_file():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
            dtype=torch.bfloat16,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    return folder
