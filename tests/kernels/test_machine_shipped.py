"""Every shipped configuration, compiled for its GPUs and executed on the machine, against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import triton
from executed import shipped_runs
from executed.known_faults import JOINED_SLICES, known_fault
from executed.shipped_runs import find

pytestmark = pytest.mark.slow

PAIRS = shipped_runs.pairs()


@pytest.mark.parametrize("kernel", ["skinny", "gemm", "hopper", "int8"])
def test_what_is_executed_is_what_ships(kernel, compiling):
    """The shapes of a run are small, but the compiler makes the same code of them, to the byte."""
    name, gpu = next(pair for pair in PAIRS if pair[0].startswith(kernel))
    executed, shipped = compiling.submit(shipped_runs.executed_and_shipped, name, gpu).result()
    assert executed == shipped


@pytest.mark.parametrize(
    "version, faulty, joined",
    [("3.6.0", 14, 1), ("3.7.0", 14, 1), ("3.7.1", 0, 1), ("3.8.0", 0, 0), ("3.9.0+git123", 0, 0)],
)
def test_known_faults(version, faulty, joined):
    """4 gemm, 6 int8 and 4 skinny: where cp.async feeds wgmma. One gemm joins slices."""
    known = [(one.kernel, known_fault(one, gpu, version)) for one, gpu in ((find(n), g) for n, g in PAIRS)]
    kernels = [kernel for kernel, fault in known if fault and fault is not JOINED_SLICES]
    assert len(kernels) == faulty and set(kernels) <= {"gemm", "int8", "skinny"}
    assert [kernel for kernel, fault in known if fault is JOINED_SLICES] == ["gemm"] * joined


def check(name, gpu, compiling):
    """No race, hazard or access out of bounds; results right; every instruction but a few executed."""
    seed = shipped_runs.seed_of(name, gpu)
    result = compiling.submit(shipped_runs.run_shipped, name, gpu, seed).result()
    if fault := known_fault(find(name), gpu, triton.__version__):
        others = [problem for problem in result.problems if not fault.explains(problem)]
        assert result.problems and not others, result.report()
        pytest.xfail(f"triton {triton.__version__}: {fault.name}")
    assert not result.problems, result.report()
    assert result.covered > 0.9, f"{result.report()}\n{result.covered:.0%} of the instructions executed"


@pytest.mark.parametrize("name, gpu", [pair for pair in PAIRS if find(pair[0]).kernel != "hopper"], ids=lambda v: v)
def test_shipped(name, gpu, compiling):
    """Those of Hopper's own kernel are in test_machine_hopper.py, for two processes to share the time."""
    check(name, gpu, compiling)
