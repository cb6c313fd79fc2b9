"""A process in which kernels are compiled: here, triton may be in the interpreter's mode, which a process keeps."""

import contextlib
import io
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor


def prepare(cache: str, paths: list[str]) -> None:
    """Before triton is imported. cache: folder for what it compiles."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    sys.path[:0] = paths
    import torch

    torch.set_num_threads(1)


def triton_version() -> str:
    import triton

    return triton.__version__


def printed(program: str) -> str:
    """What some Python prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    return out.getvalue()


def compiling_processes(cache: str, count: int = 1, triton: str | None = None) -> ProcessPoolExecutor:
    """triton: a folder that holds another one."""
    paths = [triton] if triton else []
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=prepare, initargs=(cache, paths))
