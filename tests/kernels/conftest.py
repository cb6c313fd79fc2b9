"""Kernel tests run compiled where there is a GPU and in triton's interpreter elsewhere."""

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
