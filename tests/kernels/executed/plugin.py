"""The project's kernel tests, unchanged, on the machine instead of Triton's interpreter:

    PYTHONPATH=tests/kernels:triton_kernels:. LOWBIT_MACHINE_GPU=sm_90 \
        python -m pytest -p executed.plugin tests/kernels/test_skinny.py

A test fails as well when its launches did anything they must not do. LOWBIT_MACHINE_SEED: 0.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import pytest
import triton
from machine.driver import on_machine

from lowbit_kernels import gemm, skinny  # noqa: F401 - defined now, to be compiled
from lowbit_kernels.int8 import kernel, quantize  # noqa: F401

triton.knobs.runtime.interpret = True  # while tests are collected: without a GPU they would skip


@pytest.fixture(autouse=True)
def machine():
    gpu, seed = os.environ["LOWBIT_MACHINE_GPU"], int(os.environ.get("LOWBIT_MACHINE_SEED", "0"))
    triton.knobs.runtime.interpret = False
    with on_machine(int(gpu.removeprefix("sm_")), seed=seed) as session:
        yield session
    problems = session.problems()
    assert not problems, "\n".join(problems[:10])
