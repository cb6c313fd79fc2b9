"""The packed layout: bit-exact round trips, the documented place of every code, padding that contributes nothing."""

import pytest
import torch

from lowbit_kernels.layout import SLICES, Layout, fields, interleave_gate_up, pack, unpack


def random_weight(bits, groups, sym, dtype, out_features, in_features):
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(out_features, groups) * 0.02 + 0.005).to(dtype)
    zeros = None if sym else torch.randint(0, 2**bits, (out_features, groups), dtype=torch.uint8)
    return codes, scales, zeros


SHAPES = [  # out_features, in_features, groups: small groups, groups above a tile, odd rows and inputs, per channel
    (64, 1024, 32),
    (64, 1024, 16),
    (64, 1024, 8),
    (128, 1024, 4),
    (64, 1024, 2),
    (64, 3072, 3),
    (1, 96, 3),
    (70, 320, 5),
    (5, 384, 3),
    (65, 43, 1),
    (64, 512, 1),
]


@pytest.mark.parametrize("out_features, in_features, groups", SHAPES)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", SLICES)
def test_round_trip(bits, sym, out_features, in_features, groups, device):
    for dtype in (torch.bfloat16, torch.float16):
        codes, scales, zeros = random_weight(bits, groups, sym, dtype, out_features, in_features)
        codes, scales = codes.to(device), scales.to(device)
        zeros = zeros if sym else zeros.to(device)
        before = codes.clone()
        weight, meta = pack(codes, scales, zeros, bits)
        layout = Layout.of(codes, scales, zeros, bits)
        layout.check(weight, meta)
        assert weight.device == meta.device == codes.device and torch.equal(before, codes)
        again, same_scales, same_zeros = unpack(weight, meta, layout)
        assert torch.equal(again, codes) and again.dtype == torch.uint8
        assert torch.equal(same_scales, scales) and same_scales.dtype == dtype
        assert same_zeros is None if sym else torch.equal(same_zeros, zeros)


@pytest.mark.parametrize("bits", SLICES)
def test_padding_is_zero(bits):
    """Unpacked without trimming, the padded rows and inputs are (code - zero) * scale = 0."""
    for sym in (True, False):
        for groups, in_features in ((1, 43), (3, 96)):
            codes, scales, zeros = random_weight(bits, groups, sym, torch.bfloat16, 3, in_features)
            layout = Layout.of(codes, scales, zeros, bits)
            group = layout.group_size
            full = Layout(bits, group, sym, torch.bfloat16, layout.padded_out, layout.padded_in)
            codes, scales, zeros = unpack(*pack(codes, scales, zeros, bits), full)
            zeros = torch.full_like(scales, layout.middle) if sym else zeros
            index = torch.arange(layout.padded_in) // (layout.padded_in if group == -1 else group)
            # exactly zero before the scale in padded inputs, and by their scale of 0 in padded rows
            assert not (codes.float() - zeros.float()[:, index])[:3, in_features:].any()
            assert not scales[3:].any()


@pytest.mark.parametrize("bits, per_weight", [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_stored_bits(bits, per_weight):
    layout = Layout(bits, 128, True, torch.bfloat16, 128, 4096)
    weight, _ = pack(*random_weight(bits, 32, True, torch.bfloat16, 128, 4096), bits)
    assert weight.numel() * 16 == per_weight * layout.out_features * layout.in_features


@pytest.mark.parametrize("bits", SLICES)
def test_documented_place(bits):
    """The module's formula, element by element."""
    layout = Layout(bits, 32, True, torch.bfloat16, 64, 1024)
    codes, scales, _ = random_weight(bits, 32, True, torch.bfloat16, 64, 1024)
    weight, meta = pack(codes, scales, None, bits)
    for place in torch.randint(0, codes.numel(), (300,)).tolist():
        n, k = divmod(place, 1024)
        nt, rh, g = n // 16, n // 8 % 2, n % 8
        kt, p, kb, kh, c, e = k // layout.tile, k % layout.tile // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
        code = 0
        for plane, shift, low, width in fields(bits, p):
            halfword = int(weight[nt, kt, 2 * plane + kb, 4 * g + c, 4 * kh + 2 * rh + e]) & 0xFFFF
            code |= ((halfword >> shift) & (2**width - 1)) << low
        assert code ^ (128 if bits == 8 else 0) == codes[n, k]
        word = int(meta[k // 64, n])
        half = torch.tensor((word >> 16 * (k // 32 % 2)) & 0xFFFF).to(torch.int32).to(torch.int16)
        assert half.view(torch.bfloat16) == scales[n, k // 32]


def test_interleaved_rows():
    gate, up = torch.arange(24), torch.arange(100, 124)
    rows = interleave_gate_up(gate, up)
    assert rows[:16].tolist() == [*range(8), *range(100, 108)]
    assert rows[32:48].tolist() == [*range(16, 24), *range(116, 124)]
    with pytest.raises(ValueError, match=r"gate is \[12\] and up \[12\], expected equal shapes with a multiple of 8"):
        interleave_gate_up(gate[:12], up[:12])


CODES, SCALES = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.bfloat16)
WRONG = {
    "codes-dtype": ((CODES.int(), SCALES, None, 4), r"codes are torch.int32 \[4, 64\], expected torch.uint8 \[N, K\]"),
    "codes-range": ((CODES + 16, SCALES, None, 4), "codes reach 16, expected below 16 for 4 bits"),
    "scales-dtype": ((CODES, SCALES.float(), None, 4), "dtype is torch.float32, expected torch.bfloat16 or"),
    "scales-rows": ((CODES, SCALES[:3], None, 4), r"scales have shape \[3, 2\], expected \[4, G\]"),
    "scales-groups": ((CODES, SCALES.repeat(1, 3), None, 4), r"expected \[4, G\], G a divisor of 64"),
    "zeros-dtype": ((CODES, SCALES, SCALES, 4), r"zeros are torch.bfloat16 \[4, 2\], expected torch.uint8 \[4, 2\]"),
    "group-16": ((CODES, SCALES.repeat(1, 2), None, 4), "group_size is 16, expected one of 32, 64"),
    "bits": ((CODES, SCALES, None, 5), "bits is 5, expected one of 2, 3, 4, 8"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


def test_wrong_tensors():
    layout = Layout.of(CODES, SCALES, None, 4)
    weight, meta = pack(CODES, SCALES, None, 4)
    with pytest.raises(ValueError, match=r"weight is torch.int16 \[2, 1, 2, 32, 8\], expected torch.int16 \[4, 1, 2"):
        unpack(weight[:2], meta, layout)
    with pytest.raises(ValueError, match=r"meta is torch\.float32 "):
        unpack(weight, meta.float(), layout)
