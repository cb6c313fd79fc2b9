# shellcheck shell=bash
# Sourced by the scripts beside it: `setup_env [EXTRAS]` installs lowbit[EXTRAS], editable, into .venv of this checkout and
# puts that first on PATH. Nothing happens when nothing changed; a failure prints the log's end and one line, then exits.
#
#   LOWBIT_PYTHON       interpreter that .venv is made from (default: the first Python >= 3.11 on PATH)
#   LOWBIT_CONSTRAINTS  pip constraints file (default: scripts/constraints.txt; /dev/null for none)

setup_env() {
    local extras=${1:-} root venv constraints stamp state
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=$root/.venv
    constraints=${LOWBIT_CONSTRAINTS:-$root/scripts/constraints.txt}
    [ -r "$constraints" ] || _die "constraints file $constraints is not readable: correct LOWBIT_CONSTRAINTS"

    if ! _is_usable "$venv/bin/python" pip; then # missing, half made, or made from a Python that is gone
        _make_venv "$venv"
    fi
    export PATH="$venv/bin:$PATH"

    # The root is part of the state because an editable install points at it.
    stamp=$venv/.lowbit-installed${extras:+-$extras}
    state="$root $(cat "$root/pyproject.toml" "$constraints" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    echo "installing lowbit${extras:+[$extras]} into .venv (minutes the first time)" >&2
    # torch by itself first: only then does pip settle for the build the constraints name before it reads what others ask.
    # What builds the package is pinned too, which pip does not do in an environment of its own.
    if ! "$venv/bin/python" -c 'import setuptools, torch, wheel' 2>/dev/null; then
        _quietly "$venv/bin/python" -m pip install --no-input --upgrade -c "$constraints" setuptools torch wheel
    fi
    _quietly "$venv/bin/python" -m pip install --no-input --no-build-isolation -c "$constraints" \
        -e "$root${extras:+[$extras]}"
    echo "$state" >"$stamp"
}

_die() {
    echo "error: $*" >&2
    exit 1
}

# _is_usable PYTHON MODULE: it runs, is new enough, and has MODULE (Debian ships Python without ensurepip)
_is_usable() {
    "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1
}

_make_venv() {
    local candidate
    if [ -n "${LOWBIT_PYTHON:-}" ]; then
        set -- "$1" "$LOWBIT_PYTHON"
    else
        set -- "$1" python3 python3.13 python3.12 python3.11
    fi
    for candidate in "${@:2}"; do
        if _is_usable "$candidate" ensurepip; then
            _quietly "$candidate" -m venv --clear "$1"
            return
        fi
    done
    _die "no usable Python among: ${*:2} (needs >= 3.11 with venv and ensurepip; name one in LOWBIT_PYTHON)"
}

_quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        _die "failed: $*"
    fi
    rm -f "$log"
}
