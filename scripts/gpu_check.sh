#!/usr/bin/env bash
# Check and measure the kernels on this machine's GPU, in under 8 minutes, with nothing installed but torch and triton;
# and whole models after that, where transformers, accelerate and safetensors are installed too:
#   bash scripts/gpu_check.sh [--out DIR] [--tiny]
# Peers that can be imported are measured beside them: install their wheels into a folder on PYTHONPATH (`pip download
# --no-deps bitsandbytes`; gemlite has none, `pip wheel --no-deps gemlite` makes it).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="triton_kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${LOWBIT_PYTHON:-python3}" scripts/gpu_check.py "$@"
