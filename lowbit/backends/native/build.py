"""Compiles kernels.c with the C compiler of this machine, once, and loads it.

Everything it computes with is in that file: it needs no headers of torch or Python. The result is kept in the user's
cache folder under a name that depends on the source, the compiler, torch's OpenMP and the processor.
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
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fwrapv", "-fopenmp", "-fPIC")
_SECONDS = 120


class Weight(ctypes.Structure):
    """`Weight` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("bits", "out_features", "in_features", "group_size", "integer_inputs")),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS = {
    "lowbit_linear": (ctypes.c_int, (ctypes.POINTER(Weight), _POINTER, _POINTER, _INT, _INT, _POINTER)),
    "lowbit_pack": (None, (ctypes.POINTER(Weight), _POINTER, _POINTER)),
    "lowbit_unpack": (None, (ctypes.POINTER(Weight), _INT, _INT, _POINTER, _POINTER)),
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
    return sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))[:1]


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        processor = "\n".join(
            line for line in processor.splitlines() if line.startswith(("model name", "flags", "Feat"))
        )
    except OSError:
        processor = platform.processor()
    parts = (_SOURCE.read_text(), version, *_FLAGS, *map(str, _openmp()), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(compiler: str, path: Path) -> None:
    logger.info("compiling the CPU kernels (once): %s", path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / path.name
        libraries = [str(file) for file in _openmp()] or ["-fopenmp"]
        for arguments in (
            [*_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked), *libraries, "-lm"],
        ):
            subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)
        os.replace(linked, path)  # whole or not at all, whoever else compiles at the same time
