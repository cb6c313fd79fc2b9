"""The C kernels of the native backend. What every backend must do is tested in test_backends.py, on it too."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from weights import matrix, random_quantized

from lowbit.backends import native
from lowbit.guards.safe_files import alone_in, make_private
from lowbit.native import build
from lowbit.native.linear import _weight_of, product
from lowbit.native.operators import replay
from lowbit.numerics.scheme import Scheme

SCHEMES = [Scheme(2, 16), Scheme(3, 32), Scheme(4, 128, False), Scheme(4, -1), Scheme(8, 64), Scheme(8, -1, False)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


pytestmark = pytest.mark.usefixtures("compiler")


@each_scheme
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_integers_are_kept_exactly(scheme, rows):
    """Inputs that 16 bits hold, scales that are powers of two: not one bit of y may be lost."""
    scheme_shape = (37, 1024)
    qweight = random_quantized(scheme, *scheme_shape)
    qweight.scales.copy_(2.0 ** torch.randint(-3, 1, qweight.scales.shape))
    buffers, x, y = native.prepare(qweight), torch.randint(-127, 128, (rows, 1024)).float(), torch.empty(rows, 37)
    product(_weight_of(buffers, scheme, scheme_shape), x, y, None, pieces=1)()
    assert torch.equal(y.double(), x.double() @ matrix(qweight).T)


@each_scheme
def test_small_inputs_beside_large_ones(scheme):
    """Every group of inputs has its own exponent, and float32 a second integer for what the first leaves."""
    qweight = random_quantized(scheme, 37, 1024)
    x = torch.randn(5, 1024) * torch.logspace(-9, 3, 1024)
    x[:, ::7] = 0
    y = native.linear(x, native.prepare(qweight), scheme, (37, 1024))
    exact = x.double() @ matrix(qweight).T
    assert (y - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_repeated_product(rows, dtype):
    """One call on tensors that stay where they are; what is not one call is left to the operator."""
    scheme, shape = Scheme(4, 32, False), (21, 96)
    buffers, bias = native.prepare(random_quantized(scheme, *shape, dtype)), torch.randn(21).to(dtype)
    x, y = torch.empty(rows, 96, dtype=dtype), torch.empty(rows, 21, dtype=dtype)

    def repeated(x, bias, name=scheme.name):
        return replay(y, x, buffers["codes"], buffers["scales"], buffers["zeros"], None, None, bias, name, 21)

    call = repeated(x, bias)
    for _ in range(2):
        x.copy_(torch.randn(rows, 96))
        call()
        assert torch.equal(y, native.linear(x, buffers, scheme, shape, bias))
    assert repeated(x, bias.double()) is None and repeated(x.half(), None) is None
    assert repeated(torch.empty(96, rows, dtype=dtype).t(), None) is None or rows == 1
    assert repeated(x, None, "W4A8-G32") is None


def test_what_a_dense_copy_multiplies_is_not_one_call(on_level):
    """Floats on AVX2."""
    scheme, shape = Scheme(4, 32), (21, 96)
    buffers = native.prepare(random_quantized(scheme, *shape))

    def repeated(rows, dtype):
        x, y = torch.empty(rows, 96, dtype=dtype), torch.empty(rows, 21, dtype=dtype)
        return replay(y, x, buffers["codes"], buffers["scales"], None, None, None, None, scheme.name, 21)

    on_level("portable")
    assert repeated(63, torch.float32) and repeated(64, torch.float32) is None
    assert repeated(1000, torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sym", [True, False])
def test_nan_and_infinity_reach_the_output(value, dtype, sym):
    scheme, shape = Scheme(4, 32, sym), (17, 256)
    buffers = native.prepare(random_quantized(scheme, *shape, dtype))
    x = torch.randn(3, 256).to(dtype)
    x[1, 77] = value
    y = native.linear(x, buffers, scheme, shape)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e30])
def test_inputs_of_any_size(size):
    scheme, shape = Scheme(4, 32), (17, 256)
    qweight = random_quantized(scheme, *shape)
    x = torch.rand(2, 256) * size
    y = native.linear(x, native.prepare(qweight), scheme, shape)
    exact = x.double() @ matrix(qweight).T
    assert (y - exact).norm() <= 1e-6 * exact.norm() + 1e-24  # the smallest step that is resolved is 2^-94


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    scheme, shape = Scheme(4, 64, False), (203, 512)
    qweight = random_quantized(scheme, *shape)
    x = torch.randn(7, 512)
    buffers = native.prepare(qweight)
    alone = native.linear(x, buffers, scheme, shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.linear(x, buffers, scheme, shape), alone)
    finally:
        torch.set_num_threads(before)


def test_experts_have_their_own_rows():
    scheme, shape = Scheme(4, 32), (3, 20, 64)
    weights = [random_quantized(scheme, 20, 64, torch.bfloat16, seed=seed) for seed in range(3)]
    each = [native.prepare(weight) for weight in weights]
    buffers = {name: torch.stack([buffer[name] for buffer in each]) for name in each[0]}
    x, bias = torch.randn(9, 64).bfloat16(), torch.randn(3, 20).bfloat16()
    start = torch.tensor([0, 4, 4, 7], dtype=torch.int32)  # the second has none, and two rows belong to nobody
    y = native.experts(x, buffers, start, scheme, shape, bias)
    exact = torch.zeros(9, 20, dtype=torch.float64)
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 7))):
        exact[rows] = x[rows].double() @ matrix(weights[expert]).T + bias[expert]
    assert (y - exact).norm() <= 2**-8 * exact.norm()
    assert torch.equal(y[7:], torch.zeros(2, 20).bfloat16())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_operator_is_declared_as_it_behaves(sym, requires_grad):
    scheme = Scheme(4, 32, sym)
    buffers = native.prepare(random_quantized(scheme, 18, 96))
    x, bias = (torch.randn(size).requires_grad_(requires_grad) for size in ((3, 96), (18,)))
    arguments = (x, buffers["codes"], buffers["scales"], buffers.get("zeros"), None, None, bias, scheme.name, 18)
    torch.library.opcheck(torch.ops.lowbit.linear_native.default, arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_operator_of_experts_is_declared_as_it_behaves(sym, requires_grad):
    scheme = Scheme(4, 32, sym)
    each = [native.prepare(random_quantized(scheme, 18, 96, seed=seed)) for seed in range(3)]
    codes, scales, *zeros = (
        torch.stack([one[name] for one in each]) for name in ("codes", "scales", "zeros")[: 3 - sym]
    )
    x, bias = (torch.randn(size).requires_grad_(requires_grad) for size in ((7, 96), (3, 18)))
    start = torch.tensor([0, 2, 2, 6], dtype=torch.int32)  # one row belongs to nobody
    arguments = (x, codes, scales, *(zeros or [None]), None, None, bias, start, scheme.name, 18)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if Version(torch.__version__) < Version("2.13"):  # it cannot trace a backward that is cut by numbers of tokens
        checks = checks[:3]
    torch.library.opcheck(torch.ops.lowbit.experts_native.default, arguments, test_utils=checks)


# --- building ---


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


SHOW = "from lowbit.backends import native; print(native.available())"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A compiler that does not spend seconds on speed."""
    compiler = tmp_path / "quick" / "cc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC") or "cc"} "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


@pytest.mark.slow
def test_built_once_into_the_cache_folder(tmp_path, quick):
    assert python(SHOW, LOWBIT_CACHE=str(tmp_path)) == "None\n"
    (built,) = (tmp_path / "native").iterdir()
    before = built.stat().st_mtime_ns
    assert python(SHOW, LOWBIT_CACHE=str(tmp_path)) == "None\n"
    assert [(file, file.stat().st_mtime_ns) for file in (tmp_path / "native").iterdir()] == [(built, before)]


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_one_line(tmp_path):
    reason = python(SHOW, LOWBIT_CACHE=str(tmp_path), CC=str(tmp_path / "no-such-cc"))
    assert "cannot compile the kernels" in reason and "no-such-cc" in reason and reason.count("\n") == 1
    assert "no C compiler" in python(SHOW, LOWBIT_CACHE=str(tmp_path), PATH=str(tmp_path), CC="")


@pytest.mark.slow
def test_a_compiler_that_does_not_know_all_instructions(tmp_path, quick, monkeypatch, caplog):
    """What it does not know is left out, and said."""
    if "avx2" not in build._levels():
        pytest.skip("these are the instructions of x86")
    caplog.set_level(logging.INFO, logger="lowbit")
    monkeypatch.setattr(build, "_X86_LEVELS", {"portable": (), "avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx9",)})
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    assert set(build.library.__wrapped__().levels) <= {"portable", "avx2"}
    (said,) = (record.getMessage() for record in caplog.records if "makes no kernels for" in record.getMessage())
    assert "makes no kernels for avx512: " in said and "-mavx9" in said


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.c:1: error: no such flag" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    assert build.library.__wrapped__() == f"{compiler} cannot compile the kernels: x.c:1: error: no such flag"
    assert not list((tmp_path / "cache" / "native").iterdir())


TABLES = [Path(build.__file__).parent / "source" / name for name in ("abi.c", "levels.c")]
# Of each line of FUNCTIONS in abi.h, as the portable level has it
FUNCTIONS = [
    f"{name}_portable" for name in re.findall(r"FUNCTION\(\w+, (lowbit_\w+),", TABLES[0].with_suffix(".h").read_text())
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the libraries, and compilers that take no time: CC makes whatever library $MADE names."""

    class Cache:
        folder = tmp_path / "lowbit" / "native"

        def compile(self, name: str, functions=FUNCTIONS):
            """A library that has these functions, and makes the file NAME.loaded when it is loaded."""
            source, made = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
            loaded = (
                f'__attribute__((constructor)) static void loaded(void) {{ creat("{tmp_path}/{name}.loaded", 384); }}'
            )
            source.write_text(
                f"int creat(const char *, int);\n{loaded}\n" + "".join(f"void {f}(void) {{}}\n" for f in functions)
            )
            subprocess.run([real, "-shared", "-fPIC", source, *TABLES, "-o", made], check=True)
            return made

        def plant(self, name: str, **options):
            """Put a library where the next process looks for one."""
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = self.compile(name, **options)
            build._seal(made)
            return shutil.move(made, self.path)

        @property
        def path(self):
            return self.folder / f"kernels-{build._key(str(compiler))}.so"

        def loaded(self) -> set[str]:
            """Names of the libraries that were loaded since the last call."""
            found = list(tmp_path.glob("*.loaded"))
            for file in found:
                file.unlink()
            return {file.stem for file in found}

        def library(self):
            return build.library.__wrapped__()

    real, compiler = shutil.which("cc") or shutil.which("gcc"), tmp_path / "cc"
    script = '#!/bin/sh\n[ "$1" = -shared ] || exit 0\nwhile [ "$1" != -o ]; do shift; done\ncp "$MADE" "$2"\n'
    compiler.write_text(script)
    compiler.chmod(0o755)
    cache = Cache()
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "lowbit"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("MADE", str(cache.compile("ours")))
    return cache


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "a bit of it": lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:],
    "empty": lambda data: b"",
    "text": lambda data: b"not a library",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(cache, caplog, damage):
    """It is not even tried: to load a library that is cut short ends the process."""
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"ours"}
    damaged = cache.folder / "damaged"
    damaged.write_bytes(DAMAGES[damage](cache.path.read_bytes()))
    damaged.chmod(0o700)
    damaged.replace(cache.path)  # a new file: the old one is mapped
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"ours"}
    assert f"{cache.path} is damaged" in caplog.text
    caplog.clear()
    assert isinstance(cache.library(), ctypes.CDLL) and not caplog.records


def test_of_several_processes_one_compiles(cache, monkeypatch):
    """The others wait, and load what it has made."""
    looked, kept = threading.Event(), build._kept

    def look(path):
        found = kept(path)
        looked.set()
        return found

    monkeypatch.setattr(build, "_kept", look)
    make_private(cache.folder)
    with ThreadPoolExecutor(1) as other:
        with alone_in(cache.folder):
            made = other.submit(cache.library)
            assert looked.wait(600)  # and found nothing
            cache.plant("theirs")
        assert isinstance(made.result(), ctypes.CDLL) and cache.loaded() == {"theirs"}


def foreign(path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.lchown(path, 12345, 12345)


def as_link(path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


CHANGED = {
    "anybody may write": lambda path: path.chmod(0o757),
    "the group may write": lambda path: path.chmod(0o770),
    "of another user": foreign,
    "link": as_link,
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_folder_that_others_can_change_is_not_used(cache, changed, caplog):
    cache.plant("theirs")
    CHANGED[changed](cache.folder)
    before = sorted(cache.folder.iterdir()), cache.path.read_bytes()
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"ours"}
    assert (sorted(cache.folder.iterdir()), cache.path.read_bytes()) == before
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(cache.folder) in record.message and "\n" not in record.message
    assert not list(cache.folder.parent.parent.glob("lowbit-kernels-*"))


@pytest.mark.parametrize("changed", ["anybody may write", "of another user"])
def test_a_folder_above_that_others_can_change(cache, changed, caplog):
    """They could put another folder in the place of ours."""
    cache.plant("theirs")
    CHANGED[changed](cache.folder.parent)
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"ours"}
    assert f"{cache.folder.parent} " in caplog.text


@pytest.mark.parametrize("changed", CHANGED)
def test_a_library_that_others_can_change_is_built_anew(cache, changed, caplog):
    cache.plant("theirs")
    CHANGED[changed](cache.path)
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"ours"}
    assert str(cache.path) in caplog.text and not cache.path.is_symlink()
    caplog.clear()
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() <= {"ours"} and not caplog.records


def test_a_library_that_lacks_a_function_is_built_anew(cache, caplog):
    """By the same process, which has it loaded by then."""
    cache.plant("old", functions=FUNCTIONS[:-1])
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() == {"old", "ours"}
    assert "damaged" in caplog.text
    assert isinstance(cache.library(), ctypes.CDLL) and cache.loaded() <= {"ours"}


def test_a_compiler_whose_library_lacks_a_function(cache, monkeypatch):
    monkeypatch.setenv("MADE", str(cache.compile("bad", functions=[])))
    reason = cache.library()
    assert "lowbit_linear" in reason and "\n" not in reason and not list(cache.folder.iterdir())


def test_library_built_without_a_umask_is_private(cache, caplog):
    before = os.umask(0)
    try:
        assert isinstance(cache.library(), ctypes.CDLL)
    finally:
        os.umask(before)
    assert isinstance(cache.library(), ctypes.CDLL) and not caplog.records
    for path in (cache.folder.parent, cache.folder, cache.path):
        assert path.stat().st_mode & 0o077 == 0
