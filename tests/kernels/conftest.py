"""Kernel tests run compiled where there is a GPU and in triton's interpreter elsewhere."""

import os

import pytest
import torch


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def any_compiler(monkeypatch):
    """On a GPU, configurations are also launched that its triton may break: results say whether it does."""
    if torch.cuda.is_available():
        monkeypatch.setattr("lowbit_kernels.launching.FENCED", True)


@pytest.fixture(autouse=True)
def poison(nan_poison):
    """Every kernel test has its memory poisoned."""


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory) -> str:
    """Where triton keeps what it compiles, for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "triton")


@pytest.fixture(scope="module")
def compiling(triton_cache):
    """A pool with one process, in which kernels are compiled: here triton may be in the interpreter's mode already."""
    from executed import process

    with process.compiling_processes(triton_cache) as pool:
        yield pool
