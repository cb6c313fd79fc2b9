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
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from mutations import copied, damages, first_failure, tried  # noqa: E402


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
