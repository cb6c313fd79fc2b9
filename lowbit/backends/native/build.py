"""Compiles the kernels with the C compiler of this machine, once, and loads them.

Everything they compute with is in their files: they need no headers of torch or Python. The result is kept in the
user's cache folder under a name that depends on the sources, the compiler, torch's OpenMP and the processor.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from lowbit.errors import first_line

logger = logging.getLogger("lowbit")

CACHE_VARIABLE = "LOWBIT_CACHE"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("linear.c", "matmul.c", "attention.c", "elementwise.c"))
_HEADER = Path(__file__).with_name("numbers.h")
_FLAGS = ("-O3", "-march=native", "-fwrapv", "-fopenmp", "-fPIC")
_SECONDS = 120


class Weight(ctypes.Structure):
    """`Weight` of linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("bits", "out_features", "in_features", "group_size", "integer_inputs")),
    )


class Rows(ctypes.Structure):
    """`Rows` of attention.c."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _sizes = ("batch", "heads", "group", "queries", "keys", "head_dim", "value_dim", "dtype", "last")
    _fields_ = (
        *((name, Rows) for name in ("query", "key", "value", "mask", "out")),
        *((name, ctypes.c_int64) for name in _sizes),
        ("scale", ctypes.c_float),
    )


class Operand(ctypes.Structure):
    """`Operand` of elementwise.c."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("dtype", ctypes.c_int64), ("value", ctypes.c_float)
    )  # fmt: skip


class Instruction(ctypes.Structure):
    """`Instruction` of elementwise.c."""

    _fields_ = (
        ("operation", ctypes.c_int64), ("sizes", ctypes.c_int64 * 4), ("out", Operand), ("a", Operand), ("b", Operand),
        ("index", ctypes.c_void_p), ("step", ctypes.c_int64),
    )  # fmt: skip


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_WEIGHT = ctypes.POINTER(Weight)
_FUNCTIONS = {
    "lowbit_linear": (None, (_WEIGHT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER)),
    "lowbit_pack": (ctypes.c_int, (_WEIGHT, _POINTER, _POINTER)),
    "lowbit_unpack": (None, (_WEIGHT, _INT, _INT, _POINTER, _POINTER)),
    "lowbit_matmul": (None, (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER)),
    "lowbit_run": (None, (ctypes.POINTER(Instruction), _INT)),
    "lowbit_attention": (None, (ctypes.POINTER(Attention),)),
}


def cache_folder() -> Path:
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "native"


@cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, or in one line why there are none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (install gcc or clang, or name one in CC)"
    try:
        path = cache_folder() / f"kernels-{_key(compiler)}.so"
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # not there, or damaged
            _compile(compiler, path)
            loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile the kernels: {_first_error(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot compile the kernels with {compiler}: {first_line(error)}"
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
    return lines[0].strip()[:300] if lines else "no message"


def _openmp() -> list[Path]:
    """torch's own OpenMP: with another one, two pools of threads would fight for the cores."""
    folder = Path(torch.__file__).parent / "lib"
    # by their whole names: "compiler" has an omp in it, too
    return sorted(file for name in ("libgomp", "libiomp", "libomp") for file in folder.glob(f"{name}[.5-]*"))[:1]


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        processor = "\n".join(
            line for line in processor.splitlines() if line.startswith(("model name", "flags", "Feat"))
        )
    except OSError:
        processor = platform.processor()
    parts = (*(file.read_text() for file in (*_SOURCES, _HEADER)), version, *_FLAGS, *map(str, _openmp()), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(compiler: str, path: Path) -> None:
    logger.info("compiling the CPU kernels (once): %s", path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled = {source: str(Path(folder) / f"{source.stem}.o") for source in _SOURCES}
        linked, libraries = Path(folder) / path.name, [str(file) for file in _openmp()] or ["-fopenmp"]
        for arguments in (
            *([*_FLAGS, "-c", str(source), "-o", to] for source, to in compiled.items()),
            ["-shared", *compiled.values(), "-o", str(linked), *libraries, "-lm"],
        ):
            subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(linked, path)  # whole or not at all, whoever else compiles at the same time
