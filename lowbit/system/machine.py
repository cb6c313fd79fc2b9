"""This machine and the software on it, as reports name them."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from lowbit import __version__


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors")
    return {"python": platform.python_version(), "lowbit": __version__, **{name: version(name) for name in packages}}


def machine() -> str:
    """The GPU, or the CPU with its threads."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
    return cpu()


def cpu() -> str:
    """The CPU with its threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
