"""Products of integers against float64: every width, group and dtype, rows and shapes that do not fit blocks."""

from itertools import cycle, product

import pytest
import torch
from packed import DTYPES, EXACT, ROUNDING, error, poisoned

from lowbit_kernels import launching, reference
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8.layout import GROUP_SIZES, Int8Layout

KINDS = DTYPES | {"fp32": torch.float32}
INPUTS = {64: 192, 128: 384, 256: 512, 512: 512, 1024: 1024, -1: 171}
ROWS, OUTPUTS = cycle((1, 7, 8, 9, 17, 33)), cycle((64, 70, 1))
SPLITS, TILES = cycle((1, 2, 3)), cycle((1, 1, 2))
CASES = [
    (Int8Layout(bits, group, KINDS[dtype], next(OUTPUTS), INPUTS[group]), next(ROWS), next(SPLITS), next(TILES))
    for (bits, group), dtype in zip(product((4, 8), (*GROUP_SIZES, -1)), cycle(KINDS), strict=False)
]


def codes_and_scales(layout, device):
    codes = torch.randint(0, 2**layout.bits, (layout.out_features, layout.in_features), dtype=torch.uint8)
    scales = torch.rand(layout.out_features, layout.groups) * 0.02 + 0.005
    return codes.to(device), scales.to(layout.dtype).to(device)


def rows_of(layout, rows, device, asymmetric=True):
    """codes, padded with what is not 0, scales and zeros."""
    codes = torch.randint(-128, 128, (rows, layout.padded_in), dtype=torch.int8, device=device)
    scales = torch.rand(rows, device=device) + 0.5
    zeros = torch.randint(-128, 128, (rows,), dtype=torch.int8, device=device) if asymmetric else None
    return codes, scales, zeros


def expected(rows, layout, codes, scales, bias=None):
    x, x_scales, x_zeros = rows
    x = x[:, : layout.in_features]
    return reference.int8_linear(x, x_scales, x_zeros, codes, scales, layout.bits, bias).double()


def name(value):
    if not isinstance(value, Int8Layout):
        return str(value)
    dtype = next(name for name, dtype in KINDS.items() if dtype == value.dtype)
    return f"w{value.bits}-g{value.group_size}-{dtype}-{value.out_features}x{value.in_features}"


@pytest.mark.parametrize("layout, count, split, tiles", CASES, ids=name)
def test_product(layout, count, split, tiles, device):
    codes, scales = codes_and_scales(layout, device)
    packed = int8_layout.pack(codes, scales, layout)
    tiles = tiles if layout.tiles % tiles == 0 else 1
    config = int8.Config(64, 8 if count < 10 else 16, split, tiles, group_m=2, warps=2)
    workspace = launching.Workspace(device)
    bias = torch.randn(layout.out_features, device=device).to(layout.dtype)
    for asymmetric in (True, False):
        rows = rows_of(layout, count, device, asymmetric)
        sums = int8_layout.row_sums(codes, scales, layout) if asymmetric else None
        wanted = expected(rows, layout, codes, scales, bias)
        exact = poisoned(wanted.shape, torch.float32, device)
        int8.launch(
            *rows[:2], *packed, layout, config, x_zeros=rows[2], sums=sums, bias=bias, out=exact, workspace=workspace
        )  # fmt: skip
        assert error(exact, wanted) < EXACT
    # a second launch finds the counters at zero; 16-bit outputs are the same sums, rounded once
    y = int8.launch(*rows[:2], *packed, layout, config, bias=bias, workspace=workspace)
    assert y.dtype == layout.dtype and torch.equal(y, exact.to(y.dtype))
    assert error(y, wanted) < ROUNDING.get(y.dtype, EXACT)


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_integers_are_exact(bits, device):
    """With scales of 1, and the largest codes there are: every sum is the integer, rounded to float32 at most."""
    layout = Int8Layout(bits, -1, torch.float32, 3, 1000)
    codes, _ = codes_and_scales(layout, device)
    codes[0] = 0  # stands for the most negative number
    packed = int8_layout.pack(codes, torch.ones(3, 1, device=device), layout)
    x, ones, _ = rows_of(layout, 5, device, asymmetric=False)
    x[0] = -128
    y = int8.launch(x, torch.ones_like(ones), *packed, layout, int8.Config(64, 8, warps=2))
    sums = x[:, :1000].long().cpu() @ (codes.long() - layout.middle).T.cpu()
    assert torch.equal(y.cpu(), sums.float()) and sums[0, 0] == 128 * 1000 * layout.middle


BLOCKS = {
    "n32-m8": (int8.Config(32, 8, 2, warps=1), 9),
    "n128-m32": (int8.Config(128, 32, 3, tiles=2, warps=4), 33),
    "n128-m64": (int8.Config(128, 64, warps=4, group_m=1), 130),
}


@pytest.mark.parametrize("config, count", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("bits, group", [(4, 64), (8, -1)], ids=["w4", "w8"])
def test_blocks(bits, group, config, count, device):
    layout = Int8Layout(bits, group, torch.bfloat16, 250, 512)
    codes, scales = codes_and_scales(layout, device)
    rows = rows_of(layout, count, device, asymmetric=False)
    y = poisoned((count, 250), torch.float32, device)
    int8.launch(*rows[:2], *int8_layout.pack(codes, scales, layout), layout, config, out=y)
    assert error(y, expected(rows, layout, codes, scales)) < EXACT


@pytest.mark.parametrize("bits, group", [(4, 64), (4, -1), (8, 128), (8, -1)])
def test_layout(bits, group):
    for dtype in KINDS.values():
        layout = Int8Layout(bits, group, dtype, 70, 171 if group == -1 else 384)
        codes, scales = codes_and_scales(layout, "cpu")
        weight, stored = int8_layout.pack(codes, scales, layout)
        again, same = int8_layout.unpack(weight, stored, layout)
        assert torch.equal(again, codes) and torch.equal(same, scales.float()) and same.is_contiguous()
        dense = reference.dequantize(codes, scales, None, bits)
        assert torch.equal(int8_layout.dequantize(weight, stored, layout), dense.to(dtype))
        sums = int8_layout.row_sums(codes, scales, layout)
        assert error(sums[:70], dense.double().sum(1)) < 1e-6 and not sums[70:].any()
        assert weight.numel() * (2 if bits == 4 else 1) == 128 * layout.padded_in


def test_place_of_a_nibble():
    """As the docstring of the layout says."""
    layout = Int8Layout(4, -1, torch.bfloat16, 64, 256)
    codes = torch.full((64, 256), 8, dtype=torch.uint8)
    nt, rh, g, kt, p, j, kh, c, e = 2, 1, 5, 1, 1, 0, 1, 3, 2
    codes[16 * nt + 8 * rh + g, 128 * kt + 64 * p + 32 * j + 16 * kh + 4 * c + e] = 5
    weight, _ = int8_layout.pack(codes, torch.ones(64, 1), layout)
    (place,) = weight.nonzero().tolist()
    assert place == [nt, kt, j, 4 * g + c, 8 * kh + 4 * rh + e]
    assert int(weight[tuple(place)]) == ((5 - 8) & 15) << 4


def test_defaults_can_be_launched():
    for bits, shape in product((4, 8), ((1, 1), (70, 171), (96, 1024), (4096, 14336), (28672, 4096))):
        layout = Int8Layout(bits, -1, torch.bfloat16, *shape)
        for rows in (1, 8, 9, 64, 65, 4096):
            config = int8.default_config(layout, rows)
            assert layout.padded_out % config.block_n == 0 and layout.tiles % config.tiles == 0
            assert rows > 64 or config.block_m >= rows


def test_wrong_arguments(device):
    layout = Int8Layout(8, -1, torch.bfloat16, 64, 100)
    codes, scales = codes_and_scales(layout, device)
    packed = int8_layout.pack(codes, scales, layout)
    x, x_scales, zeros = rows_of(layout, 2, device)

    def launch(x=x, x_scales=x_scales, config=int8.Config(64), **kwargs):  # noqa: B008 - a frozen default
        return int8.launch(x, x_scales, *packed, layout, config, **kwargs)

    for arguments, words in (
        ({"x": x[:, :100]}, r"codes is torch.int8 \[2, 100\].*expected torch.int8 \[2, 128\]"),
        ({"x_scales": x_scales[:1]}, r"x_scales is torch.float32 \[1\]"),
        ({"x_zeros": zeros}, "x_zeros and sums are given together"),
        ({"config": int8.Config(128)}, "block_n 128 does not divide the 64 padded"),
        ({"config": int8.Config(64, tiles=2)}, "tiles 2 does not divide the 1 K tiles"),
        ({"bias": torch.zeros(64, device=device)}, "bias is torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            launch(**arguments)
    assert launch(x[:0], x_scales[:0]).shape == (0, 64)
    for form, words in (
        ((3, -1, torch.bfloat16, 64, 64), "bits is 3"),
        ((4, 32, torch.bfloat16, 64, 64), "group_size is 32"),
        ((4, -1, torch.float64, 64, 64), "dtype is torch.float64"),
        ((4, -1, torch.float16, 64, 2**16 + 1), "at most 65536 in_features"),
        ((4, 64, torch.float16, 64, 100), "not a multiple of group_size 64"),
    ):
        with pytest.raises(ValueError, match=words):
            Int8Layout(*form)
    with pytest.raises(ValueError, match="codes reach 16"):
        narrow = Int8Layout(4, -1, torch.bfloat16, 64, 100)
        int8_layout.pack(torch.full((64, 100), 16, dtype=torch.uint8), scales.cpu(), narrow)
