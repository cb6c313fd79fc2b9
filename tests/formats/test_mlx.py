"""Our MLX tensors against the bit stream read by numpy. What mlx makes of them: tests/interop/test_mlx_lm.py."""

import numpy as np
import pytest
import torch
from weights import BITS, DTYPES, matrix, random_quantized

from lowbit.errors import InputError
from lowbit.formats import mlx
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# (N, K, group): one row, rows that fill no word, groups that are the whole row
SHAPES = [(1, 32, 32), (7, 96, 32), (5, 64, 64), (3, 384, 128), (33, 128, 128)]
CASES = [(Scheme(b, g, sym), n, k) for b in BITS for sym in (True, False) for n, k, g in SHAPES]
cases = pytest.mark.parametrize(("scheme", "rows", "columns"), CASES, ids=[f"{s.name}-{n}x{k}" for s, n, k in CASES])


def read(tensors, bits, group):
    """float64 [N, K] = code * scale + bias, by the layout's definition: bit i of a row's stream is bit i % 32 of word
    i // 32."""
    words = tensors["weight"].numpy()
    stream = (words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(len(words), -1, bits)
    codes = torch.from_numpy((stream * 2 ** np.arange(bits)).sum(-1)).double()
    scales, biases = (tensors[name].double().repeat_interleave(group, dim=1) for name in ("scales", "biases"))
    return codes * scales + biases


@cases
def test_packed_numbers_are_ours(scheme, rows, columns):
    for name in ("bf16", "fp16"):
        qweight = random_quantized(scheme, rows, columns, DTYPES[name])
        tensors = mlx.pack(qweight)
        assert tuple(tensors) == mlx.SUFFIXES
        assert tensors["weight"].dtype == torch.uint32
        assert tensors["weight"].shape == (rows, columns * scheme.bits // 32)
        assert tensors["scales"].dtype == DTYPES[name]
        assert tensors["biases"].dtype == (DTYPES[name] if scheme.sym else torch.float32)
        assert torch.equal(read(tensors, scheme.bits, scheme.group_size), matrix(qweight))


@cases
def test_planned_shapes_are_those_written(scheme, rows, columns):
    real = mlx.pack(random_quantized(scheme, rows, columns, torch.bfloat16))
    meta = mlx.pack(QuantWeight.meta(rows, columns, scheme, torch.bfloat16))
    assert [(name, t.shape, t.dtype) for name, t in real.items()] == [(n, t.shape, t.dtype) for n, t in meta.items()]


def test_golden_bytes():
    """Three bits: codes that straddle words."""
    codes = torch.tensor([[(5 * k + 1) % 8 for k in range(32)]], dtype=torch.uint8)
    zeros = torch.tensor([[3]], dtype=torch.uint8)
    tensors = mlx.pack(QuantWeight(codes, torch.tensor([[0.5]], dtype=torch.float16), Scheme(3, 32, False), zeros))
    assert tensors["weight"].numpy().tobytes().hex() == "f1509d" * 4
    assert tensors["scales"].tolist() == [[0.5]] and tensors["biases"].tolist() == [[-1.5]]


@pytest.mark.parametrize("group", [16, 256, -1])
def test_other_groups_are_refused(group):
    assert "MLX has groups of 32, 64, 128 inputs only" in mlx.refuse(Scheme(4, group))
    assert mlx.refuse(Scheme(4, 64)) is None


@pytest.mark.parametrize(
    ("scheme", "dtype", "scale", "message"),
    [
        (Scheme(4, 32, False), torch.float32, 1.1, "not exact in float32; MLX needs scales of 16 bits"),
        (Scheme(4, 32, True), torch.float16, 9000, "-72000 is not exact in float16; MLX needs smaller scales"),
    ],
    ids=["float32", "overflow"],
)
def test_biases_that_would_be_rounded_are_refused(scheme, dtype, scale, message):
    plain = random_quantized(scheme, 2, 32, dtype)
    zeros = None if scheme.sym else torch.full((2, 1), 13, dtype=torch.uint8)
    with pytest.raises(InputError, match=message):
        mlx.pack(QuantWeight(plain.codes, torch.full((2, 1), scale, dtype=dtype), scheme, zeros))


def test_config():
    config = mlx.config(Scheme(4, 64), {"model.layers.0.mlp.up_proj": Scheme(8, 32)})
    assert config == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip
