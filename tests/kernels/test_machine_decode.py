"""The decode loop on the machine: a step with all operators, captured as lowbit captures it, and replayed."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("kernels need triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from executed import decode_runs
from executed.source_damage import DECODE_FAULTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", DECODE_FAULTS)
def test_faults_are_noticed(name, compiling):
    """Put into the launchers, the capture or a kernel on purpose."""
    problems = compiling.submit(decode_runs.run_faulty, name).result()
    assert any(DECODE_FAULTS[name].noticed in problem for problem in problems), problems


def test_replays_give_the_same_tokens(compiling):
    """Two replays on the same buffers, another stream's between them: logits equal to the bit, counters at zero after
    each launch, nothing shared that is written; the capture reads nothing on the host and allocates no workspace."""
    result = compiling.submit(decode_runs.run_decode, "sm_90", 0).result()
    assert not result.problems, "\n".join(result.problems)
    assert result.operators == 10 and result.launches == 12 * result.operators
