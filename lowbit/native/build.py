"""Compiles the kernels with the C compiler of this machine, once, and loads them.

Everything they compute with is in their files: they need no headers of torch or Python. Each is compiled once for every
level of instructions; which of them runs is decided when the library is loaded (`abi.Library`).

The result is kept in the user's cache folder under a name that depends on the sources, the compiler, torch's OpenMP and
the processor. Loading a library runs its code: one that somebody else can have put there is not loaded
(safe_files.distrust).
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from lowbit.errors import first_line
from lowbit.guards.safe_files import alone_in, distrust, make_private, open_existing
from lowbit.native.abi import AbiError, Library
from lowbit.system.cache import CACHE_VARIABLE as CACHE_VARIABLE
from lowbit.system.cache import cache_root

logger = logging.getLogger("lowbit")

# Names the level of instructions to use (doctor shows which there are); or ALL: the best one, of all of them
LEVEL_VARIABLE, ALL_LEVELS = "LOWBIT_CPU_LEVEL", "all"
_FOLDER = Path(__file__).parent / "source"
_SOURCES = tuple(sorted(_FOLDER.glob("*.c")))
_HEADERS = tuple(sorted(_FOLDER.glob("*.h")))
# Compiled once; the others once for each level
_FOR_ALL_LEVELS = ("abi.c", "levels.c")
_FLAGS = ("-O3", "-fwrapv", "-fopenmp", "-fPIC", "-Wno-psabi")
_X86 = ("-march=x86-64", "-mtune=native")  # whatever the compiler has by default
_AVX2 = (*_X86, "-mavx2", "-mfma")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")))
# Levels of abi.h -> what tells the compiler of their instructions
_X86_LEVELS = {
    "portable": (*_X86, "-O1"),  # for processors before 2013, and what the others are compared with
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
}
# What Linux says of a processor that has them
_FLAGS_OF_LEVELS = {
    "avx2": "avx2", "avxvnni": "avx_vnni", "avx512": "avx512_vnni", "avx512bf16": "avx512_bf16",
}  # fmt: skip
_ARM_LEVELS = {"portable": ("-march=native", "-DPLAIN_C"), "neon": ("-march=armv8.2-a+dotprod",)}
_OTHER_LEVELS = {"portable": ("-march=native",)}  # whose vectors the compiler makes of plain C
_SECONDS = 300  # for a file, on a machine that is busy
_SEAL_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    return cache_root() / "native"


@cache
def library() -> Library | str:
    """The compiled kernels, or in one line why there are none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (install gcc or clang, or name one in CC)"
    try:
        return _on_level(_cached(compiler))
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile the kernels: {_first_error(error.stderr)}"
    except AbiError as error:
        return f"what {compiler} makes of the kernels does not fit to lowbit.native.abi: {error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot compile the kernels with {compiler}: {first_line(error)}"


def _on_level(kernels: Library) -> Library | str:
    """The library on the level that LOWBIT_CPU_LEVEL names, or why it has none of that name."""
    level = os.environ.get(LEVEL_VARIABLE) or ALL_LEVELS
    if level != ALL_LEVELS:
        if level not in kernels.levels:
            return f"{LEVEL_VARIABLE} is {level!r}; this machine runs {', '.join(kernels.levels)}"
        kernels.use(level)
    return kernels


def constant(name: str) -> int:
    """The value of a constant or enumerator of abi.h. Only where there is a library."""
    return library().constants[name]


@cache
def has_amx() -> bool:
    """Whether the processor has tiles of AMX. These kernels do not use them."""
    return "amx_bf16" in _processor().split()


def _cached(compiler: str) -> Library:
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
    if not isinstance(kept := _kept(path), str):
        return kept
    with alone_in(folder):  # of several processes that start together one compiles
        if not isinstance(kept := _kept(path), str):
            return kept
        if kept:
            logger.warning("%s: the CPU kernels are compiled anew", kept)
        else:
            logger.info("compiling the CPU kernels (once): %s", path)
        with tempfile.TemporaryDirectory(dir=folder) as private:
            made = _compile(compiler, Path(private))
            # under a name of its own: of the one at `path`, what is loaded already would come back
            loaded = _load(made)
            os.replace(made, path)  # whole or not at all, where folders cannot be locked
    return loaded


def _kept(path: Path) -> Library | str:
    """The library at a path, or why it is not loaded: "" if there is none."""
    try:
        return distrust(path) or _load(path)
    except FileNotFoundError:
        return ""
    except (OSError, AbiError) as error:  # cut short, or of another version
        return f"{path} is damaged ({first_line(error)})"


def _load(path: Path) -> Library:
    """Raises OSError for what is no library as `_seal` left it, AbiError for one that does not fit to abi.py."""
    data = path.read_bytes()
    if _digest(data[:-_SEAL_BYTES]) != data[-_SEAL_BYTES:]:
        raise OSError("its content does not fit its checksum")
    return Library(path)


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
    parts = (
        *(file.read_text() for file in (*_SOURCES, *_HEADERS)),
        version,
        *_FLAGS,
        repr(_levels()),
        *map(str, _openmp()),
        _processor(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """Name and features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Feat")))


def _levels() -> dict[str, tuple[str, ...]]:
    """What is compiled: the best level of this processor, and the portable one. All of them, which takes three times as
    long, where one is asked for by its name, or nothing is known of the processor."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return _ARM_LEVELS if machine in ("aarch64", "arm64") else _OTHER_LEVELS
    features = _processor().split()
    if os.environ.get(LEVEL_VARIABLE) or "sse2" not in features:
        return _X86_LEVELS
    *_, best = (level for level in _X86_LEVELS if level == "portable" or _FLAGS_OF_LEVELS[level] in features)
    return {level: flags for level, flags in _X86_LEVELS.items() if level in ("portable", best)}


def _takes(compiler: str, level: str, flags: tuple[str, ...]) -> bool:
    """Whether a compiler knows the instructions of a level: one that does not makes the library without it."""
    probe = [compiler, *flags, "-E", "-x", "c", os.devnull]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        logger.info("%s makes no kernels for %s: %s", compiler, level, _first_error(done.stderr))
    return done.returncode == 0


def _compile(compiler: str, folder: Path) -> Path:
    """Compile into an empty folder that nobody else can write to. Returns the library."""
    levels = {
        level: flags for level, flags in _levels().items() if level == "portable" or _takes(compiler, level, flags)
    }
    jobs = []
    for source in _SOURCES:
        common = source.name in _FOR_ALL_LEVELS
        for level, flags in {"": ()}.items() if common else levels.items():
            named = () if common else (f"-DLEVEL={level}",)
            jobs.append((str(folder / f"{source.stem}-{level}.o"), ["-c", str(source), *_FLAGS, *flags, *named]))

    def run(arguments: list[str]) -> None:
        subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=_SECONDS)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run([*job[1], "-o", job[0]]), jobs))
    linked, libraries = folder / "kernels.so", [str(file) for file in _openmp()] or ["-fopenmp"]
    run(["-shared", *(made for made, _ in jobs), "-o", str(linked), *libraries, "-lm"])
    _seal(linked)
    linked.chmod(0o700)  # whatever the umask is, or it would not be loaded again
    return linked
