"""Kernels compiled from damaged sources and executed: does the machine notice? (mutations.py damages PTX.)"""

import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from executed.source_damage import DAMAGE, Damage

ROOT = Path(__file__).resolve().parents[3]
KERNELS = "lowbit_kernels"
PACKAGES = {KERNELS: ROOT / "triton_kernels" / KERNELS, "lowbit": ROOT / "lowbit"}


@dataclass(frozen=True)
class Verdict:
    """noticed: the first thing that is wrong."""

    damage: Damage
    noticed: str | None

    @property
    def unexplained(self) -> bool:
        return self.noticed is None and self.damage.equivalent is None


def damaged(damage: Damage) -> str:
    """The text of the file. Raises ValueError if what is damaged does not stand in it once."""
    package, _, file = damage.file.partition("/")
    text = (PACKAGES[package] / file).read_text()
    if (count := text.count(damage.before)) != 1:
        raise ValueError(f"{damage.name}: {damage.before!r} stands {count} times in {damage.file}, expected once")
    return text.replace(damage.before, damage.after)


@contextlib.contextmanager
def damaged_package(damage: Damage) -> Iterator[Path]:
    """A folder with the whole package, damaged."""
    with tempfile.TemporaryDirectory(prefix="damaged-") as folder:
        package = damage.file.partition("/")[0]
        shutil.copytree(PACKAGES[package], Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / damage.file).write_text(damaged(damage))
        yield Path(folder)


def run(damage: Damage, seed: int = 0) -> Verdict:
    """In a process of process.py, whose package is another one afterwards: every run imports its own."""
    from executed import shipped_runs

    with damaged_package(damage) as folder:
        sys.path.insert(0, str(folder))
        _forget()
        try:
            result = shipped_runs.run_shipped(configuration(damage), damage.gpu, seed)
            noticed = result.problems[0] if result.problems else None
        except Exception as error:  # damaged code may do anything
            noticed = f"{type(error).__name__}: {error}"[:200]
        finally:
            sys.path.remove(str(folder))
            _forget()
    return Verdict(damage, noticed)


def _forget() -> None:
    """Import the package anew, and what holds it."""
    for name in [n for n in sys.modules if n.partition(".")[0] == KERNELS or n == "executed.problems"]:
        del sys.modules[name]
    if "executed" in sys.modules and hasattr(sys.modules["executed"], "problems"):
        del sys.modules["executed"].problems


def configuration(damage: Damage) -> str:
    """The whole id."""
    from executed import shipped_runs

    pairs = shipped_runs.pairs()
    return next(name for name, gpu in pairs if name.startswith(damage.configuration) and gpu == damage.gpu)


def sample(count: int, seed: int) -> list[Damage]:
    """Of those that can be noticed."""
    return random.Random(seed).sample([one for one in DAMAGE if one.equivalent is None], count)
