"""Run tests/interop in the environment of the clients; write the outcome to scripts/benchmarks/results/interop.json.

    python scripts/interop/record.py CLIENTS_PYTHON

CLIENTS_PYTHON is the interpreter of an environment with tests/interop/requirements.txt. Each file of tests has a
process of its own: the clients patch each other's dependencies. Exit code 1 if a test failed.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "scripts" / "benchmarks" / "results" / "interop.json"
PACKAGES = ("torch", "transformers", "compressed-tensors", "gptqmodel", "optimum", "llmcompressor", "auto-round")


def run(python: str, test: Path) -> dict[str, str]:
    """Test name -> passed, failed or skipped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "triton_kernels", "tests"))}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(test)]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {case.get("name"): next((c.tag for c in case if c.tag != "system-out"), "passed") for case in cases}


def versions(python: str) -> dict[str, str]:
    script = f"from importlib.metadata import version; print(*[version(p) for p in {PACKAGES}])"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(PACKAGES, found, strict=True))


def main() -> None:
    python = sys.argv[1]
    folder = ROOT / "tests" / "interop"
    results = {name: run(python, folder / f"test_{name}.py") for name in ("autoround", "gptqmodel", "llmcompressor")}
    record = {"date": str(datetime.date.today()), "versions": versions(python), "results": results}
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    outcomes = [outcome for cases in results.values() for outcome in cases.values()]
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})
    sys.exit(any(outcome not in ("passed", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    main()
