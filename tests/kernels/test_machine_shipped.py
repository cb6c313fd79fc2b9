"""Every shipped configuration, compiled for its GPUs and executed on the machine, against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import triton
from executed import process, shipped_runs
from executed.known_faults import known_fault, version_of

pytestmark = pytest.mark.slow

PAIRS = [
    (name, gpu) for name, gpu in shipped_runs.pairs() if version_of(triton.__version__) >= shipped_runs.find(name).since
]  # fmt: skip


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    with process.compiling_processes(str(tmp_path_factory.mktemp("triton"))) as pool:
        yield pool


@pytest.mark.parametrize("name, gpu", PAIRS, ids=lambda v: v)
def test_shipped(name, gpu, compiling):
    """No race, hazard or access out of bounds; results right; every instruction but a few executed."""
    seed = shipped_runs.seed_of(name, gpu)
    result = compiling.submit(shipped_runs.run_shipped, name, gpu, seed).result()
    if fault := known_fault(shipped_runs.find(name), gpu, triton.__version__):
        others = [problem for problem in result.problems if fault.rule not in problem]
        assert result.problems and not others, result.report()
        pytest.xfail(f"triton {triton.__version__}: {fault.name}")
    assert not result.problems, result.report()
    assert result.covered > 0.9, f"{result.report()}\n{result.covered:.0%} of the instructions executed"
