"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `pytest -m sanitize`, or scripts/sanitize.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def missing() -> str | None:
    """Why the kernels cannot be built with sanitizers here."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return "there is no gcc"
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        if not os.path.isabs(found.strip()):  # gcc answers with the bare name
            return f"gcc has no {name}"
    return None


@pytest.mark.sanitize
def test_kernels_under_sanitizers():
    if reason := missing():
        pytest.skip(reason)
    # for the script this process's interpreter; it names a compiler and a cache folder of its own
    environment = {**os.environ, "LOWBIT_PYTHON": sys.executable}
    done = subprocess.run([ROOT / "scripts/sanitize.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
