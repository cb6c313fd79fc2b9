#!/usr/bin/env bash
# The tests in one cell of the compatibility matrix, an environment of its own:
#
#   scripts/test_cell.sh oldest                             the lower bounds of pyproject.toml (their last bug fixes)
#   scripts/test_cell.sh newest tests/formats               the newest of everything; what follows the cell goes to pytest
#   scripts/test_cell.sh newest,transformers=5.17 -x        the newest but for what is named
#   scripts/test_cell.sh oldest,torch=2.13.0                the lower bounds but for what is named
#
#   LOWBIT_PYTHON   interpreter to make it from (default: python3)
#   LOWBIT_CELLS    where environments are kept (default: .cells of this checkout)
#
# PyPI's torch for Linux is a CUDA build of gigabytes; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' scripts/test_cell.sh >&2; exit 2; }
cell=$1
shift

python=${LOWBIT_PYTHON:-python3}
venv=${LOWBIT_CELLS:-.cells}/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$cell
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
PATH=$venv/bin:$PATH

python - "$cell" >"$venv/constraints.txt" <<'END'
import re, sys, tomllib

base, *named = sys.argv[1].split(",")
if base not in ("oldest", "newest") or not all(re.fullmatch(r"[\w-]+=[\w.+]+", pin) for pin in named):
    sys.exit(f"error: no cell {sys.argv[1]}; expected oldest or newest, then ,PACKAGE=VERSION as often as needed")
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
named_by_test = [*extras["report"], *extras["serve"]]  # as lowbit[report,serve]
wanted = [*project["dependencies"], *extras["test"], *named_by_test]
found = (re.match(r"([\w-]+)[^>]*>=([\w.]+)", each) for each in wanted)
bounds = dict(each.groups() for each in found if each)
pins = {name: f"{version}.*" for name, version in bounds.items()} if base == "oldest" else {}
pins |= dict(pin.split("=") for pin in named)
print(*(f"{name}=={version}" for name, version in pins.items()), sep="\n")
END

# torch by itself first: only then is its build settled before pip reads what the others ask for
pip install --quiet -c "$venv/constraints.txt" torch
pip install --quiet -c "$venv/constraints.txt" -e ".[test]"
python -c 'import sys
from importlib.metadata import version
names = ("torch", "transformers", "triton", "compressed-tensors", "numpy")
print("Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in names))'

export HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
python -m pytest -q "$@"
