#!/usr/bin/env bash
# From a fresh clone to a measured 4-bit model in a few minutes, on a CPU and offline: scripts/quickstart.sh [OUTPUT_DIR]
set -euo pipefail
out=${1:-build/quickstart-output/reference-W4A16-G128}
[[ $# -eq 0 || $out == /* ]] || out=$PWD/$out
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env

export HF_HUB_OFFLINE=1 # `reference` is a small language model of Python that comes with lowbit

show() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

show lowbit quantize reference -o "$out" --scheme W4A16 --overwrite
show lowbit inspect "$out"
show lowbit eval "$out" --reference reference --num-tokens 20000
show lowbit generate "$out" --prompt $'def factorial(n):\n    """Return n!."""\n' --max-new-tokens 48

printf '\nTalk to it:\n  source .venv/bin/activate\n  lowbit chat %q\n' "$out"
