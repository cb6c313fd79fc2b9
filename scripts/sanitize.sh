#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: builds them with gcc into a folder of their own
# and runs the tests that call them. Arguments go to pytest: scripts/sanitize.sh tests/native/test_native.py -x
#
#   LOWBIT_PYTHON   interpreter that has the packages (default: .venv/bin/python of this checkout)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${LOWBIT_PYTHON:-.venv/bin/python}
compiler=$(command -v gcc) || { echo "error: this needs gcc" >&2; exit 2; }
# (not the tests of compiling and caching: each would wait for a compiler that takes a minute with sanitizers)
[ $# -gt 0 ] || set -- -q -k "not built and not cache and not library and not machines" tests/native/test_native.py \
    tests/native/test_levels.py tests/native/test_native_gemm.py tests/native/test_matmul.py tests/native/test_attention.py \
    tests/native/test_elementwise.py tests/native/test_fuzzed_kernels.py tests/native/test_native_gptq.py \
    tests/native/test_native_moments.py tests/backends/test_integer_inputs.py

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# build.py takes its compiler from CC: this one adds what it does not know of. -fno-wrapv: overflows are reported, too.
cat >"$work/cc" <<END
#!/bin/sh
exec "$compiler" "\$@" -O1 -g -fno-wrapv -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
END
chmod +x "$work/cc"
export CC=$work/cc LOWBIT_CACHE=$work/cache HF_HUB_OFFLINE=1 PYTHONPATH=$PWD:$PWD/triton_kernels:$PWD/tests
# Python keeps what it has until it ends: leaks are not ours. New memory holds bytes that overflow where they are used.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:malloc_fill_byte=165:max_malloc_fill_size=67108864
export UBSAN_OPTIONS=print_stacktrace=1 LOWBIT_KERNEL_CASES=${LOWBIT_KERNEL_CASES:-200}
# Both runtimes come before the interpreter's own libraries.
runtimes=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)
LD_PRELOAD=$runtimes "$python" -m pytest -p no:cacheprovider --capture=sys "$@" # what a sanitizer says is not captured
"$python" - "$work/cache" <<'END'
import pathlib, sys

built = list(pathlib.Path(sys.argv[1]).rglob("*.so"))
if not any(b"__asan_init" in file.read_bytes() for file in built):
    sys.exit("error: no kernels were built with sanitizers: the tests ran without them")
END
