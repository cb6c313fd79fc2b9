"""What a calibrated run expects to take, and whether its forward passes stay open between the stages of a layer."""

import pytest
import torch

from lowbit.quantization import memory
from lowbit.quantization.memory import expected_memory

HELD_NOW = 10_000
BATCHES = [torch.zeros(rows, 8, dtype=torch.long) for rows in (2, 2, 1)]
# Two streams of 40 tokens, whose input and residual have 3 numbers of 2 bytes each
OPEN_PASSES = 2 * 40 * 2 * 3 * 2


@pytest.mark.parametrize(
    ("allowed", "free", "keep"),
    [
        (HELD_NOW + OPEN_PASSES, 0, True),
        (HELD_NOW + OPEN_PASSES - 1, 10**9, False),
        (None, 2 * OPEN_PASSES, True),  # half of what is free
        (None, 2 * OPEN_PASSES - 2, False),
    ],
)
def test_passes_stay_open_where_that_is_allowed(allowed, free, keep, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda: HELD_NOW)
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    expected = expected_memory([[]], BATCHES, 2, torch.bfloat16, 3, True, allowed)
    assert expected.keep == keep
    assert expected.peak == HELD_NOW + (OPEN_PASSES if keep else OPEN_PASSES // len(BATCHES))  # else one at a time
