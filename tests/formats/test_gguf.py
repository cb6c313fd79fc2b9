"""Our blocks through the gguf package's own dequantizer."""

import numpy as np
import pytest
import torch
from weights import BITS, matrix, random_quantized

from lowbit.errors import InputError
from lowbit.formats import gguf as blocks
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

gguf = pytest.importorskip("gguf")

# (N, K, group): one block, odd rows, groups of several blocks, one scale for a row
SHAPES = [(1, 32, 32), (7, 96, 32), (5, 192, 64), (3, 256, 128), (33, 160, -1)]
CASES = [(Scheme(b, g, sym), n, k) for b in BITS for sym in (True, False) for n, k, g in SHAPES]
cases = pytest.mark.parametrize(("scheme", "rows", "columns"), CASES, ids=[f"{s.name}-{n}x{k}" for s, n, k in CASES])


def storable(scheme, rows, columns):
    """Random codes with scales that fp16 holds; 8-bit codes stay within 127 of their zero points."""
    qweight = random_quantized(scheme, rows, columns, torch.float16)
    if scheme.bits == 8 and not scheme.sym:
        return QuantWeight(qweight.codes, qweight.scales, scheme, 121 + qweight.zeros % 8)
    return qweight


def read(data, kind):
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@cases
def test_their_dequantizer_gives_our_weights(scheme, rows, columns):
    qweight = storable(scheme, rows, columns)
    if scheme.bits == 8 and not scheme.sym:
        qweight = QuantWeight(qweight.codes.clamp(8, 240), qweight.scales, scheme, qweight.zeros)
    kind = blocks.symmetric_type(scheme) if scheme.sym else blocks.asymmetric_type(qweight)
    data = blocks.pack(qweight, kind)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert data.dtype == torch.uint8 and data.shape == (rows, columns // block * size)
    assert torch.equal(read(data, kind).double(), matrix(qweight))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_minima_that_fp16_holds_give_the_smaller_type(bits):
    scheme, kind = Scheme(bits, 64, False), "Q5_1" if bits == 5 else "Q4_1"
    plain = random_quantized(scheme, 9, 128)
    unit = torch.ldexp(torch.ones(9, 2), torch.randint(-16, -8, (9, 2))).bfloat16()
    qweight = QuantWeight(plain.codes, 129 * unit, scheme, plain.zeros % 8)
    assert blocks.asymmetric_type(qweight) == kind
    data = blocks.pack(qweight, kind)
    assert torch.equal(read(data, kind).double(), matrix(qweight))
    if bits == 4:
        odd = QuantWeight(plain.codes, 255 * unit, scheme, torch.full_like(plain.zeros, 15))  # a product of 12 bits
        assert blocks.asymmetric_type(odd) == "Q8_0"
        with pytest.raises(InputError, match=r"the minimum -\S+ is not exact in float16"):
            blocks.pack(odd, "Q4_1")


def test_golden_bytes():
    """In every type: d = 0.5, then the codes 0..15 twice, shifted by one."""
    codes = torch.tensor([[(k + k // 16) % 16 for k in range(32)]], dtype=torch.uint8)
    half = torch.tensor([[0.5]], dtype=torch.float16)
    nibbles = bytes((k + 1) % 16 << 4 | k for k in range(16)).hex()
    symmetric = QuantWeight(codes, half, Scheme(4, 32))
    shifted = QuantWeight(codes, half, Scheme(4, 32, False), torch.tensor([[3]], dtype=torch.uint8))
    assert blocks.pack(symmetric, "Q4_0").numpy().tobytes().hex() == "0038" + nibbles
    assert blocks.pack(shifted, "Q4_1").numpy().tobytes().hex() == "0038" + "00be" + nibbles
    codes = torch.arange(32, dtype=torch.uint8)[None]  # of five bits: the fifth is that of the upper half
    nibbles = bytes(17 * k for k in range(16)).hex()
    symmetric = QuantWeight(codes, half, Scheme(5, 32))
    shifted = QuantWeight(codes, half, Scheme(5, 32, False), torch.tensor([[3]], dtype=torch.uint8))
    assert blocks.pack(symmetric, "Q5_0").numpy().tobytes().hex() == "0038" + "0000ffff" + nibbles
    assert blocks.pack(shifted, "Q5_1").numpy().tobytes().hex() == "0038" + "00be" + "0000ffff" + nibbles
    wide = np.array(codes.tolist()[0], dtype=np.int8) - 3
    assert blocks.pack(shifted, "Q8_0").numpy().tobytes().hex() == "0038" + wide.tobytes().hex()


@pytest.mark.parametrize(("group", "columns"), [(16, 64), (-1, 48)])
def test_groups_that_are_not_blocks_are_refused(group, columns):
    assert f"groups of {16 if group == 16 else 48} inputs are no multiple" in blocks.refuse(Scheme(4, group), columns)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_groups_of_several_blocks_are_not_refused(group):
    assert blocks.refuse(Scheme(4, group), 192) is None


@pytest.mark.parametrize("scale", [1e6, 1e-7, 0.1], ids=["overflow", "underflow", "rounded"])
def test_scales_that_fp16_does_not_hold_are_refused(scale):
    plain = random_quantized(Scheme(4, 32), 3, 64)
    scales = torch.full((3, 2), 0.25)
    scales[2, 1] = scale
    with pytest.raises(InputError, match=r"the scale \S+ is not exact in float16"):
        blocks.pack(QuantWeight(plain.codes, scales, plain.scheme), "Q4_0")


def test_eight_bits_far_from_their_zero_are_refused():
    codes = torch.tensor([[0] * 31 + [255]], dtype=torch.uint8)
    qweight = QuantWeight(codes, torch.ones(1, 1), Scheme(8, 32, False), torch.tensor([[9]], dtype=torch.uint8))
    with pytest.raises(InputError, match=r"\[-9, 246\]; Q8_0 holds \[-128, 127\]: quantize to 8 bits symmetrically"):
        blocks.asymmetric_type(qweight)


def test_act_order_is_refused():
    plain = random_quantized(Scheme(4, 32), 2, 64)
    scattered = QuantWeight(plain.codes, plain.scales, plain.scheme, None, torch.arange(64, dtype=torch.int32) % 2)
    with pytest.raises(ValueError, match="g_idx"):
        blocks.pack(scattered, "Q4_0")
