"""Damages of the code that tests have to notice (mutations.toml), made one by one in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from folders import ROOT

_SECONDS = 600  # a damage may make a test hang: that is noticed too


@dataclass(frozen=True)
class Damage:
    """`old`, which is in `file` exactly once, becomes `new`; one of `tests` has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def problem(self, root: Path) -> str | None:
        """Why it cannot be made in the checkout `root`."""
        file = root / self.file
        count = file.read_text(encoding="utf-8").count(self.old) if file.is_file() else None
        if count != 1:
            return f"{self.file} is not there" if count is None else f"{self.old!r} is in {self.file} {count} times"
        lost = [test for test in self.tests if not (root / test).is_file()]
        return f"{lost[0]} is not there" if lost else None


def damages() -> list[Damage]:
    table = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))
    return [Damage(**entry) for entry in table["damage"]]


def copied(target: Path) -> Path:
    """The files that git tracks or would, without what is ignored, under `target`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def first_failure(copy: Path, tests: list[str], seconds: float | None = None) -> str | None:
    """The first test that fails in the copy, None if all pass; seconds: the longest that they may take. Raises
    RuntimeError where none could be run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "triton_kernels")])}
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"a test that was not done after {seconds} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (1, 2) or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return failed[1]


def tried(damage: Damage, copy: Path) -> dict:
    """Make it, run its tests, take it back."""
    file = copy / damage.file
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole.replace(damage.old, damage.new), encoding="utf-8")
    try:
        return {**asdict(damage), "noticed_by": first_failure(copy, damage.tests, _SECONDS)}
    finally:
        file.write_text(whole, encoding="utf-8")
