"""Fixtures of the tests of kernels in C."""

import pytest

from lowbit.native.build import library


@pytest.fixture
def on_level(compiler):
    """on_level(name): kernels of this level of instructions from here on."""
    kernels = library()
    before = kernels.level
    yield kernels.use
    kernels.use(before)


@pytest.fixture(params=["portable", "avx2", "avxvnni", "avx512", "avx512bf16"])
def level(request, on_level):
    """The test runs once on each level that this machine has."""
    if request.param not in library().levels:
        pytest.skip(f"this machine does not run {request.param}")
    on_level(request.param)
    return request.param
