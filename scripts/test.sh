#!/usr/bin/env bash
# Lint, format, types and tests: the one command of developers and of CI.
#
#   scripts/test.sh                                  all of it, in about eleven minutes on two cores
#   scripts/test.sh --quick                          without the tests marked slow: about three minutes
#   scripts/test.sh tests/numerics/test_grid.py -x   arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env dev

export HF_HUB_OFFLINE=1 # a test that needs the network is a broken test
unset OMP_NUM_THREADS   # tests/conftest.py sets the threads
# All of it: a process for each core, each file in one of them (its fixtures are made once, its order stays),
# the longest files first: tests/conftest.py sorts them.
quick=()
[ "${1:-}" != --quick ] || { quick=(-m "not slow") && shift; }
[ $# -gt 0 ] || set -- -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

python -m ruff check .
python -m ruff format --check .
# Types beside the tests: one process, which would leave the other cores idle for a minute
types=$(mktemp)
python -m mypy >"$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2>/dev/null || true; rm -f "$types"' EXIT
failed=0
python -m pytest ${quick[@]+"${quick[@]}"} "$@" || failed=$?
wait "$checking" || failed=1
cat "$types"
exit "$failed"
