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


@pytest.mark.parametrize("kernel", ["skinny", "gemm", "hopper", "int8"])
def test_what_is_executed_is_what_ships(kernel, compiling):
    """The shapes of a run are small, but the compiler makes the same code of them, to the byte."""
    name, gpu = next(pair for pair in PAIRS if pair[0].startswith(kernel))
    executed, shipped = compiling.submit(shipped_runs.executed_and_shipped, name, gpu).result()
    assert executed == shipped


@pytest.mark.parametrize("version, faulty", [("3.6.0", 12), ("3.7.0", 12), ("3.7.1", 0), ("3.9.0+git123", 0)])
def test_known_faults(version, faulty):
    """4 gemm, 6 int8 and 2 skinny: where cp.async feeds wgmma."""
    known = [(shipped_runs.find(name), gpu) for name, gpu in shipped_runs.pairs()]
    known = [one.kernel for one, gpu in known if one.since <= version_of(version) and known_fault(one, gpu, version)]
    assert len(known) == faulty and set(known) <= {"gemm", "int8", "skinny"}


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
