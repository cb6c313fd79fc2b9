"""Shapes, strides, splits, blocks and dtypes that nobody chose, executed on the machine, against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import triton
from executed import drawn_runs
from executed.known_faults import known_fault

pytestmark = pytest.mark.slow

SEEDS = range(8)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("seed", SEEDS)
def test_drawn(gpu, seed, compiling):
    """scripts/kernel_execution.py draws more of them."""
    result = compiling.submit(drawn_runs.run_drawn, gpu, seed).result()
    fault = known_fault(None, gpu, triton.__version__)
    assert not [problem for problem in result.problems if not (fault and fault.explains(problem))], result.report()
