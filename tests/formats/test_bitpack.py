"""The dense bit stream against Python integers of any size."""

import pytest
import torch

from lowbit.formats import bitpack
from lowbit.formats.bitpack import pack, packed_width, unpack

LENGTHS = [
    1, 2, 3, 5, 7, 8, 9, 10, 11, 13, 15, 16, 17, 21, 31, 32, 33, 43, 63, 64, 65, 97, 127, 128, 129, 172, 255, 257,
]  # fmt: skip


def random_codes(rows, length, bits):
    codes = torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8)
    codes[0, -1] = 2**bits - 1  # the last code reaches every bit of the end
    return codes


def stream_words(codes, bits):
    """Signed 32-bit words of one row, by the definition: code i occupies bits [i * bits, (i + 1) * bits)."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def words(*unsigned):
    return [[word - 2**32 if word >= 2**31 else word for word in unsigned]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_equals_the_definition_and_unpack_inverts_it(bits):
    for length in LENGTHS:
        codes = random_codes(3, length, bits)
        before = codes.clone()
        packed = pack(codes, bits)
        assert packed.dtype == torch.int32 and packed.is_contiguous()
        assert packed.shape == (3, packed_width(length, bits))
        assert packed.tolist() == [stream_words(row, bits) for row in codes.tolist()], length
        assert torch.equal(codes, before)

        before = packed.clone()
        again = unpack(packed, bits, length)
        assert again.dtype == torch.uint8 and again.is_contiguous() and torch.equal(again, codes), length
        assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_slices_join(bits, monkeypatch):
    monkeypatch.setattr(bitpack, "_SLICE_CODES", 100)  # two rows, and one that is left over
    codes = random_codes(37, 43, bits)
    assert torch.equal(unpack(pack(codes, bits), bits, 43), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_is_left_unwritten(bits, nan_poison):
    for length in (1, 31, 33, 97):
        codes = random_codes(2, length, bits)
        assert pack(codes, bits).tolist() == [stream_words(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack(pack(codes, bits), bits, length), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_inputs(bits):
    codes = random_codes(7, 33, bits)
    packed = pack(codes, bits)
    for strided in (codes.T.contiguous().T, torch.stack([codes, codes ^ 255], dim=2)[:, :, 0]):
        assert torch.equal(pack(strided, bits), packed)
    assert torch.equal(unpack(packed.T.contiguous().T, bits, 33), codes)
    one_word = pack(codes[:, :3], bits)  # one column: contiguous in the eyes of torch whatever its strides
    assert torch.equal(unpack(one_word.as_strided((7, 1), (1, 7)), bits, 3), codes[:, :3])
    assert torch.equal(unpack(torch.cat([packed, packed], dim=1)[:, : packed.shape[1]], bits, 33), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_meta_tensors(bits):
    for length in (1, 33, 172):
        packed = pack(torch.empty(5, length, dtype=torch.uint8, device="meta"), bits)
        assert (packed.device.type, packed.dtype) == ("meta", torch.int32)
        assert packed.shape == pack(torch.zeros(5, length, dtype=torch.uint8), bits).shape
        codes = unpack(packed, bits, length)
        assert (codes.device.type, codes.dtype, codes.shape) == ("meta", torch.uint8, (5, length))


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_rows(bits):
    assert pack(torch.empty(0, 33, dtype=torch.uint8), bits).shape == (0, packed_width(33, bits))
    assert unpack(torch.empty(0, packed_width(33, bits), dtype=torch.int32), bits, 33).shape == (0, 33)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 9], words(0x87654321, 0x9)),
        (8, [1, 2, 3, 4, 5], words(0x04030201, 0x05)),
        (2, [0, 1, 2, 3] * 4 + [3], words(0xE4E4E4E4, 0x3)),
        (1, [1, 0, 0, 1] + [0] * 28 + [1], words(0x9, 0x1)),
        # code 10 straddles the first two words (two bits and one), code 21 the next two (one bit and two)
        (3, [0] * 10 + [7] + [0] * 21, words(0b11 << 30, 1, 0)),
        (3, [0] * 21 + [5] + [0] * 10, words(0, 1 << 31, 0b10)),
        (3, [7] * 10, words(0x3FFFFFFF)),
        (3, [7] * 11, words(0xFFFFFFFF, 1)),
        # the zero points of symmetric GPTQ files: v2 holds 2^(bits - 1), v1 one less
        (2, [2] * 16, words(0xAAAAAAAA)),
        (3, [4] * 32, words(0x24924924, 0x49249249, 0x92492492)),
        (4, [8] * 8, words(0x88888888)),
        (8, [128] * 4, words(0x80808080)),
        (2, [1] * 16, words(0x55555555)),
        (3, [3] * 32, words(0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D)),
        (4, [7] * 8, words(0x77777777)),
        (8, [127] * 4, words(0x7F7F7F7F)),
    ],
)
def test_golden_words(bits, codes, expected):
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == expected
    assert unpack(torch.tensor(expected, dtype=torch.int32), bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize(("length", "bits", "width"), [(32, 3, 3), (4096, 3, 384), (172, 3, 17), (1, 8, 1), (9, 4, 2)])
def test_packed_width(length, bits, width):
    assert packed_width(length, bits) == width
