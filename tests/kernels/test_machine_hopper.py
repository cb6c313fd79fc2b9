"""Every shipped configuration of gemm_hopper, executed on the machine, against float64."""

import pytest
from test_machine_shipped import PAIRS, check, find

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name, gpu", [pair for pair in PAIRS if find(pair[0]).kernel == "hopper"], ids=lambda v: v)
def test_shipped(name, gpu, compiling):
    check(name, gpu, compiling)
