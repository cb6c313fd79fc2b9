"""Decoding of GGML blocks, against the gguf package: to the bit, for any bytes."""

import numpy as np
import pytest
import torch

from lowbit.checkpoint.gguf import slices
from lowbit.checkpoint.gguf.blocks import TYPES

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [1, 60])
def test_any_blocks(kind, rows, monkeypatch):
    """Also with scales that are infinite or NaN, and in slices that end within a row."""
    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf package does not know {kind}")
    known, (values, size) = gguf.GGMLQuantizationType[kind], (TYPES[kind].values, TYPES[kind].size)
    assert gguf.GGML_QUANT_SIZES[known] == (values, size)
    monkeypatch.setattr(slices, "_AT_ONCE", 3 * values)
    data = np.random.default_rng(0).integers(0, 256, (rows, 5 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(data, known))
    for dtype in (torch.float32, torch.bfloat16):
        made = slices.decode(torch.from_numpy(data), TYPES[kind], dtype)
        torch.testing.assert_close(made, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    zero = expected == 0
    assert torch.equal(torch.signbit(made)[zero], torch.signbit(expected)[zero])
