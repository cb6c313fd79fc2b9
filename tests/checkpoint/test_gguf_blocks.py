"""Decoding of GGML blocks, against the gguf package: to the bit, for any bytes."""

import numpy as np
import pytest
import torch

from lowbit.checkpoint.gguf import affine

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", affine.TYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_any_blocks(kind, rows, monkeypatch):
    """Also of scales that are infinite or NaN, and in slices that end within a row."""
    known = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[known] == affine.TYPES[kind][:2]
    monkeypatch.setattr(affine, "_AT_ONCE", 3 * affine.TYPES[kind][0])
    data = np.random.default_rng(0).integers(0, 256, (rows, 5 * affine.TYPES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(data, known))
    for dtype in (torch.float32, torch.bfloat16):
        made = affine.decode(torch.from_numpy(data), kind, dtype)
        torch.testing.assert_close(made, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    zero = expected == 0
    assert torch.equal(torch.signbit(made)[zero], torch.signbit(expected)[zero])
