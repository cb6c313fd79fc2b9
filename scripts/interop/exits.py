"""Records what tests/interop checks: how far other engines' logits of exported tiny models are from transformers'.

    pip install -r tests/interop/requirements-mlx.txt
    PYTHONPATH=.:triton_kernels:tests:tests/interop:scripts/benchmarks python scripts/interop/exits.py mlx

and the same with `llama-cpp`. Writes scripts/benchmarks/results/interop_*.json.
"""

import importlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from common import save

# What is recorded -> the test module with its cases, and the packages that have a say in them
ENGINES = {"mlx": ("test_mlx_lm", ("mlx", "mlx-lm")), "llama-cpp": ("test_llama_cpp", ("xllamacpp", "gguf"))}


def main(engine: str) -> None:
    module, packages = ENGINES[engine]
    tests, rows = importlib.import_module(module), []
    for name, scheme, detail in tests.CASES:
        with tempfile.TemporaryDirectory() as folder:
            error = tests.logits_error(name, scheme, detail, Path(folder))
        rows.append({"architecture": name, "scheme": scheme, "detail": str(detail), "relative_error_of_logits": error})
    versions = {package: version(package) for package in packages}
    save(f"interop_{engine.replace('-', '_')}", {**versions, "device": "cpu", "cases": rows})


if __name__ == "__main__":
    main(sys.argv[1])
