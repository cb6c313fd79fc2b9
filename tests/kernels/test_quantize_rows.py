"""Rows in eight bits: to the bit what torch computes, and close to float64 behind a norm."""

from itertools import product

import pytest
import torch
from packed import DTYPES, rms_norm

from lowbit_kernels import reference
from lowbit_kernels.int8 import quantize

KINDS = DTYPES | {"fp32": torch.float32}
WIDTHS = (1, 100, 128, 129, 700)


def rows_apart(count, width, dtype, device):
    """x [count, width] in rows that lie apart, with NaN between them; a row of zeros, and sizes from tiny to large."""
    storage = torch.full((count, width + 8), float("nan"), dtype=dtype, device=device)
    x = storage[:, :width]
    x.copy_(torch.randn(count, width, device=device) * torch.logspace(-4, 3, count, device=device)[:, None])
    x[0] = 0
    x[1] = x[1].abs()  # zero point at the end of the range
    return x


def assert_same(found, wanted, width):
    codes, scales, zeros = found
    assert torch.equal(codes[:, :width], wanted[0]) and not codes[:, width:].any()
    assert codes.shape[1] == -(-width // 128) * 128
    assert torch.equal(scales, wanted[1]) and (zeros is None if wanted[2] is None else torch.equal(zeros, wanted[2]))


@pytest.mark.parametrize("width, dtype", list(product(WIDTHS, KINDS)))
def test_like_torch_to_the_bit(width, dtype, device):
    x = rows_apart(7, width, KINDS[dtype], device)
    scale, zero = torch.tensor([0.03], device=device), torch.tensor([-37], dtype=torch.int8, device=device)
    for sym in (True, False):
        assert_same(quantize.rows(x, sym=sym), reference.quantize_rows(x, sym), width)
        static = (scale, None if sym else zero)
        found = quantize.rows(x, sym=sym, static_scale=static[0], static_zero=static[1])
        assert_same(found, reference.quantize_rows(x, sym, *static), width)


def test_reference_against_float64():
    x = rows_apart(7, 300, torch.float32, "cpu")
    for sym in (True, False):
        codes, scales, zeros = reference.quantize_rows(x, sym)
        wide = x.double()
        size = wide.abs().amax(1) / 127.5 if sym else (wide.amax(1).clamp(min=0) - wide.amin(1).clamp(max=0)) / 255
        assert ((scales.double() - size).abs() <= size * 1e-6 + 1e-37).all()
        back = (codes.double() - (0 if sym else zeros.double()[:, None])) * scales.double()[:, None]
        assert ((back - wide).abs() <= 1.001 * size[:, None] + 1e-37).all()
        assert (back - wide).norm() < 0.01 * wide.norm()


def test_halves_go_to_even(device):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 200.0, -200.0]], device=device)
    codes, scales, _ = quantize.rows(x, static_scale=torch.ones(1, device=device))
    assert codes[0, :8].tolist() == [0, 2, 2, 0, -2, -2, 127, -128] and scales.tolist() == [1.0]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_infinity_make_the_scale_nan(value, device):
    x = torch.ones(3, 200, device=device)
    x[1, 77] = value
    scale = torch.tensor([0.5], device=device)
    for sym in (True, False):
        zero = None if sym else torch.zeros(1, dtype=torch.int8, device=device)
        _, scales, _ = quantize.rows(x, sym=sym)
        assert scales.isnan().tolist() == [False, True, False]
        assert torch.equal(scales.isnan(), reference.quantize_rows(x, sym)[1].isnan())
        codes, scales, _ = quantize.rows(x, sym=sym, static_scale=scale, static_zero=zero)
        if value != value:
            assert scales.isnan().tolist() == [False, True, False]
        else:
            assert scales.tolist() == [0.5] * 3 and codes[1, 77] == (127 if value > 0 else -128)


@pytest.mark.parametrize("dtype", KINDS)
def test_behind_a_norm(dtype, device):
    x = rows_apart(5, 300, KINDS[dtype], device)
    weight = (torch.rand(300, device=device) + 0.5).to(x.dtype)
    exact = rms_norm(x, weight, 1e-5)
    codes, scales, _ = quantize.rows(x, norm_weight=weight, eps=1e-5)
    size = exact.abs().amax(1) / 127.5
    assert ((scales.double() - size).abs() <= 1e-6 * size + 1e-37).all()
    # half a code, and what float32 moves; the largest may be limited to 127
    off = (codes[:, :300].double() - (exact / size.clamp(min=1e-37)[:, None]).clamp(-128, 127)).abs()
    assert off.max() < 0.5 + 1e-3 and not codes[:, 300:].any()


def test_wrong_arguments(device):
    x = torch.ones(2, 64, device=device)
    scale, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int8, device=device)
    for x_, arguments, words in (
        (x.double(), {}, "x is torch.float64"),
        (x.T, {}, "rows in one piece"),
        (x[0], {}, r"x is torch.float32 \[64\]"),
        (x, {"static_zero": zero}, "static_zero goes with static_scale"),
        (x, {"sym": False, "static_scale": scale}, "static_zero goes with static_scale"),
        (x, {"static_scale": scale.double()}, "static_scale is torch.float64"),
        (x, {"norm_weight": scale}, r"norm_weight is torch.float32 \[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize.rows(x_, **arguments)
    assert quantize.rows(x[:0])[0].shape == (0, 128)
