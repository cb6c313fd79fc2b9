"""Records what tests/interop/test_mlx_lm.py checks: mlx-lm's logits of exported tiny models, and versions.

pip install -r tests/interop/requirements-mlx.txt
PYTHONPATH=.:triton_kernels:tests:tests/interop:scripts/benchmarks python scripts/interop_mlx.py
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

from common import save
from test_mlx_lm import CASES, logits_error


def main() -> None:
    rows = []
    for name, scheme, dtype in CASES:
        with tempfile.TemporaryDirectory() as folder:
            error = logits_error(name, scheme, dtype, Path(folder))
        stored = str(dtype).removeprefix("torch.")
        rows.append({"architecture": name, "scheme": scheme, "dtype": stored, "relative_error_of_logits": error})
    save("interop_mlx", {"mlx": version("mlx"), "mlx-lm": version("mlx-lm"), "device": "cpu", "cases": rows})


if __name__ == "__main__":
    main()
