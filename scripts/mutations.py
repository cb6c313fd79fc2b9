#!/usr/bin/env python
"""Whether the tests notice when the code is broken: each damage of tests/mutations.toml is made in a copy of this
checkout, and its tests have to fail there.

    python scripts/mutations.py                       # all of them: some minutes
    python scripts/mutations.py --only "zero point"   # those whose name has these words
    python scripts/mutations.py --out mutations.json  # the table as JSON too

Run it after a change that makes tests fewer. The copy holds what git tracks or would; the checkout is never written to.
Exits with 1 if a damage is missed, cannot be made, or its tests fail without it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutations.toml"
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
    return [Damage(**entry) for entry in tomllib.loads(TABLE.read_text(encoding="utf-8"))["damage"]]


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


def first_failure(copy: Path, tests: list[str]) -> str | None:
    """The first test that fails in the copy, None if all pass. Raises RuntimeError where none could be run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "triton_kernels")])}
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"none came to an end in {_SECONDS} s"
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
        return {**asdict(damage), "noticed_by": first_failure(copy, damage.tests)}
    finally:
        file.write_text(whole, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="words of the names of damages")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    chosen = [damage for damage in damages() if arguments.only in damage.name]
    problems = [f"{damage.name}: {problem}" for damage in chosen if (problem := damage.problem(ROOT))]
    if problems or not chosen:
        print("\n".join(problems) or f"no damage has {arguments.only!r} in its name", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="lowbit-mutations-") as folder:
        copy = copied(Path(folder))
        if failed := first_failure(copy, sorted({test for damage in chosen for test in damage.tests})):
            print(f"{failed} fails in a copy without damage", file=sys.stderr)
            return 1
        results = []
        for damage in chosen:
            results.append(tried(damage, copy))
            by = results[-1]["noticed_by"]
            print(f"{'MISSED ' if by is None else 'noticed'}  {damage.file}: {damage.name}  {by or ''}", flush=True)
    missed = [result["name"] for result in results if result["noticed_by"] is None]
    print(f"{len(results) - len(missed)} of {len(results)} damages were noticed")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
