"""Compiles the kernels with the C compiler of this machine, once, and loads them.

Everything they compute with is in their files: they need no headers of torch or Python. The result is kept in the
user's cache folder under a name that depends on the sources, the compiler, torch's OpenMP and the processor. Loading a
library runs its code: one that somebody else can have put there is not loaded (safe_files.distrust).
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
from lowbit.guards.safe_files import distrust, make_private, open_existing

logger = logging.getLogger("lowbit")

CACHE_VARIABLE = "LOWBIT_CACHE"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("linear.c", "matmul.c", "attention.c", "elementwise.c"))
_HEADER = Path(__file__).with_name("numbers.h")
_FLAGS = ("-O3", "-march=native", "-fwrapv", "-fopenmp", "-fPIC")
_SECONDS = 120
_SEAL_BYTES = hashlib.sha256().digest_size


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
        return _cached(compiler)
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile the kernels: {_first_error(error.stderr)}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"cannot compile the kernels with {compiler}: {first_line(error)}"


def _cached(compiler: str) -> ctypes.CDLL:
    """The library of the cache folder, which is compiled if it is not there, damaged, or perhaps not ours: loading one
    runs code. In a folder that others can change nothing is kept, and nothing that is there is loaded."""
    folder = Path(os.path.abspath(cache_folder()))
    make_private(folder)
    if reason := distrust(folder):
        logger.warning(
            "%s: the CPU kernels are compiled for this process alone; name a folder of your own in %s to keep them",
            reason, CACHE_VARIABLE,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="lowbit-kernels-") as private:
            return _load(_compile(compiler, Path(private)))
    path = folder / f"kernels-{_key(compiler)}.so"
    try:
        if not (reason := distrust(path)):
            return _load(path)
    except FileNotFoundError:
        logger.info("compiling the CPU kernels (once): %s", path)
    except (OSError, AttributeError) as error:  # cut short, or it lacks a function
        reason = f"{path} is damaged ({first_line(error)})"
    if reason:
        logger.warning("%s: the CPU kernels are compiled anew", reason)
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = _compile(compiler, Path(private))
        loaded = _load(made)  # under a name of its own: of the one at `path`, what is loaded already would come back
        os.replace(made, path)  # whole or not at all, whoever else compiles at the same time
    return loaded


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError for what is no library as `_seal` left it, AttributeError for one that lacks a function."""
    data = path.read_bytes()
    if _digest(data[:-_SEAL_BYTES]) != data[-_SEAL_BYTES:]:
        raise OSError("its content does not fit its checksum")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _seal(path: Path) -> None:
    """Append the checksum of a library, which the loader passes over: of a file that is cut short it does not say that
    it is damaged, the process ends with a bus error."""
    data = path.read_bytes()
    with open_existing(path) as file:
        file.seek(len(data))
        file.write(_digest(data))


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


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


def _compile(compiler: str, folder: Path) -> Path:
    """Compile into an empty folder that nobody else can write to. Returns the library."""
    compiled = {source: str(folder / f"{source.stem}.o") for source in _SOURCES}
    linked, libraries = folder / "kernels.so", [str(file) for file in _openmp()] or ["-fopenmp"]
    for arguments in (
        *([*_FLAGS, "-c", str(source), "-o", to] for source, to in compiled.items()),
        ["-shared", *compiled.values(), "-o", str(linked), *libraries, "-lm"],
    ):
        subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)
    _seal(linked)
    linked.chmod(0o700)  # whatever the umask is, or it would not be loaded again
    return linked
