#!/usr/bin/env python
"""Fuzz the readers of model folders for as long as you like: the cases of tests/test_fuzz.py, and any number more.

python scripts/fuzz.py --cases 20000 --seed 7
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "triton_kernels"), str(ROOT / "tests")]

from fuzz import cases, failure, make_folders, quiet  # noqa: E402 - behind the path to it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--slow", type=float, default=5.0, help="tell of cases that take more seconds")
    arguments = parser.parse_args()
    quiet()
    failures = 0
    with tempfile.TemporaryDirectory() as where:
        folders = make_folders(Path(where) / "originals")
        for case in islice(cases(folders, arguments.seed), arguments.cases):
            started = time.perf_counter()
            if problem := failure(case, Path(where) / "copies"):
                failures += 1
                print(problem, flush=True)
            if (seconds := time.perf_counter() - started) > arguments.slow:
                print(f"slow, {seconds:.1f} s: {case}", flush=True)
    print(f"{arguments.cases} cases of seed {arguments.seed}: {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
