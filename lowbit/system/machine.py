"""A run, this machine and the software on it, as reports name them."""

import platform
from dataclasses import asdict, dataclass, field
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


@dataclass
class RunFacts:
    """What every report says of the run that wrote a folder: with what, when and where, `seconds` of wall time and
    `peak_memory` in bytes.

    The fields of a report are the keys of its file, in their order. Those of `class Report(RunFacts, First)` are the
    fields of First, these, and its own.
    """

    lowbit: str = __version__
    date: str = field(default_factory=now)
    versions: dict[str, str] = field(default_factory=versions)
    machine: str = field(default_factory=machine)
    seconds: float = 0.0
    peak_memory: int = 0

    def to_dict(self) -> dict:
        """Key -> value of the file."""
        return asdict(self)
