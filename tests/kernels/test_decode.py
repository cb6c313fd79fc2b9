"""The PTX of every decoding, executed here over all halfwords: what the kernels compile is what is proved. What other
GPUs compile is run beside it, and gives the same bits."""

import re

import numpy as np
import pytest
import torch
from covering import slow_but

pytest.importorskip("triton", reason="kernels need triton")

import triton
import triton.language as tl
from packed import DTYPES

from lowbit_kernels.decode import fragment, fragment_ptx, scale_ptx, scaled, slices_of
from lowbit_kernels.int8.kernel import nibbles_ptx
from lowbit_kernels.layout import SLICES, fields, zero_offset

HALFWORDS = np.arange(65536, dtype=np.uint32)
# the upper half of a register holds something else than the lower one, so that nothing may leak between them
OTHERS = HALFWORDS[::-1].copy()


def values(halves, dtype):
    """Numbers float64 that 16-bit patterns stand for."""
    halves = halves.astype(np.uint32)
    if dtype == "bf16":
        return (halves << 16).view(np.float32).astype(np.float64)
    return halves.astype(np.uint16).view(np.float16).astype(np.float64)


def patterns(numbers, dtype):
    """16-bit patterns of float64 numbers, rounded to nearest even (exact products and sums come in as float64)."""
    if dtype == "fp16":
        return numbers.astype(np.float16).view(np.uint16).astype(np.uint32)
    single = numbers.astype(np.float32)
    assert (single == numbers).all(), "rounding twice"
    bits = single.view(np.uint32)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def execute(text, *inputs):
    """Run inline assembly on registers $1, ...: arrays uint32. Returns $0."""
    registers = {f"${i}": value for i, value in enumerate(inputs, start=1)}

    def read(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    lines = [line.strip() for line in text.strip().removeprefix("{").removesuffix("}").split(";")]
    for line in filter(None, lines):
        operation, arguments = line.split(maxsplit=1)
        if operation == ".reg":
            continue
        target, *sources = re.split(r",\s*", arguments)
        sources = [read(source) for source in sources]
        if operation == "mov.b32":
            result = sources[0]
        elif operation == "shr.u32":
            result = sources[0] >> sources[1]
        elif operation == "shl.b32":
            result = sources[0] << sources[1]
        elif operation == "lop3.b32":
            a, b, c, table = sources
            result = np.uint32(0)
            for minterm in range(8):  # bit i of the table is the result for (a, b, c) = the bits of i
                if table >> minterm & 1:
                    chosen = [v if minterm >> s & 1 else ~v for v, s in ((a, 2), (b, 1), (c, 0))]
                    result = result | (chosen[0] & chosen[1] & chosen[2])
        else:
            dtype = {"fma.rn.bf16x2": "bf16", "fma.rn.f16x2": "fp16"}[operation]
            low, high = (
                patterns(np.multiply(*(values(s >> shift & 0xFFFF, dtype) for s in sources[:2]))
                         + values(sources[2] >> shift & 0xFFFF, dtype), dtype)
                for shift in (0, 16)
            )  # fmt: skip
            result = low | high << 16
        registers[target] = np.asarray(result, dtype=np.uint32)
    return registers["$0"]


@triton.jit
def fragment_kernel(
    h0, h1, h2, summands, out, P: tl.constexpr, BITS: tl.constexpr, SYM: tl.constexpr, SIZE: tl.constexpr
):
    """Grid (summands,): slice P of SIZE halfwords, decoded without PTX, with each summand in turn."""
    i = tl.arange(0, SIZE)
    z = tl.program_id(0)
    planes = (tl.load(h0 + i), tl.load(h1 + i), tl.load(h2 + i))
    DTYPE: tl.constexpr = out.dtype.element_ty
    a = fragment(planes[0], planes[1], planes[2], tl.load(summands + z), P, BITS, SYM, DTYPE, False)
    tl.store(out + z * SIZE + i, a)


@triton.jit
def scaled_kernel(a, scale, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, scaled(tl.load(a + i), tl.load(scale + i), out.dtype.element_ty, False))


def tensor(halves, dtype, device):
    """16-bit patterns as a tensor."""
    return torch.from_numpy(halves.astype(np.uint16).view(np.int16)).to(device).view(dtype)


def without_ptx(planes, summands, bits, p, sym, dtype, device):
    """uint32 [summands, halfwords]: 16-bit patterns of what `fragment` makes of one plane or three."""
    planes = [tensor(plane, torch.int16, device) for plane in (planes * 3)[:3]]
    out = torch.empty(len(summands), len(HALFWORDS), dtype=DTYPES[dtype], device=device)
    fragment_kernel[(len(summands),)](*planes, tensor(summands, out.dtype, device), out, p, bits, sym, len(HALFWORDS))
    return out.view(torch.int16).cpu().numpy().view(np.uint16).astype(np.uint32)


def codes_of(planes, bits, p):
    """The codes that halfwords hold by the layout's table, the planes in the order in which `fields` names them."""
    code = sum(
        ((h >> shift) & (2**width - 1)) << low
        for h, (_, shift, low, width) in zip(planes, fields(bits, p), strict=True)
    )
    return (code ^ 128 if bits == 8 else code).astype(np.int64)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", slow_but((4,), SLICES))
def test_every_halfword_and_zero_point(bits, dtype, device):
    offset = zero_offset(bits, dtype == "fp16")
    generator = np.random.default_rng(0)
    assert slices_of(bits) == SLICES[bits]
    for p in range(SLICES[bits]):
        # every halfword in each plane; several planes in orders of their own
        low = [HALFWORDS, *(generator.permutation(HALFWORDS) for _ in fields(bits, p)[1:])]
        high = [OTHERS, *(generator.permutation(HALFWORDS) for _ in fields(bits, p)[1:])]
        registers = [a | b << 16 for a, b in zip(low, high, strict=True)]
        summands = patterns(-(np.arange(2.0**bits) + offset), dtype)
        some = [*range(0, 2**bits, max(2**bits // 16, 1)), 2**bits - 1]
        portable = dict(zip(some, without_ptx(low, summands[some], bits, p, False, dtype, device), strict=True))
        portable[None] = without_ptx(low, summands[:1], bits, p, True, dtype, device)[0]
        for zero in (None, *range(2**bits)):
            summand = [] if zero is None else [summands[zero] * 0x10001]
            result = execute(fragment_ptx(bits, p, zero is None, dtype), *registers, *summand)
            assert zero not in portable or (result & 0xFFFF == portable[zero]).all(), (bits, p, zero)
            for half, planes in ((result & 0xFFFF, low), (result >> 16, high)):
                expected = codes_of(planes, bits, p) - (2 ** (bits - 1) if zero is None else zero)
                assert (values(half, dtype) == expected).all(), (bits, p, zero)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_scale_rounds_once(dtype, device):
    codes = np.arange(-255, 256, dtype=np.float64)
    for scale in values(np.array([0x0000, 0x3F80, 0x3C23, 0x2E66, 0x1234]), dtype):
        a, b = patterns(codes, dtype), patterns(np.full_like(codes, scale), dtype)
        result = execute(scale_ptx(dtype), a | a << 16, b | b << 16)
        assert (result == patterns(codes * scale, dtype) * 0x10001).all()
        operands = (tensor(np.append(x, 0), DTYPES[dtype], device) for x in (a, b))
        out = torch.empty(len(a) + 1, dtype=DTYPES[dtype], device=device)
        scaled_kernel[(1,)](*operands, out, len(out))
        assert torch.equal(out[:-1], tensor(result & 0xFFFF, out.dtype, device))


@pytest.mark.parametrize(
    "bits, dtype, shifts, others",
    [(2, "bf16", 2, 16), (2, "fp16", 1, 16), (3, "bf16", 6, 34), (3, "fp16", 3, 34), (4, "bf16", 3, 8),
     (4, "fp16", 1, 8), (8, "bf16", 1, 6), (8, "fp16", 1, 4)],
)  # fmt: skip
def test_instructions_of_a_k_tile(bits, dtype, shifts, others):
    """Two weights cost one lop3 and one fma, and as few shifts as a mantissa allows: the compiler makes equal ones of
    several slices one. More would make decoding the bottleneck on Hopper."""
    shifted, found = set(), 0
    for p in range(SLICES[bits]):
        text = fragment_ptx(bits, p, True, dtype)
        starts = map(int, re.findall(r"shr\.u32 t, \$\d, (\d+);", text))
        shifted |= {(plane, start) for (plane, *_), start in zip(fields(bits, p), starts, strict=True) if start}
        found += len(re.findall(r"(lop3|fma)\.", text))
    assert (len(shifted), found) == (shifts, others)


@pytest.mark.parametrize("p", [0, 1])
def test_nibbles_of_an_integer_product(p):
    """Four bytes of a register at once: a nibble in two's complement becomes the int8 that is 16 times its code."""
    packed = HALFWORDS | OTHERS << 16
    found = execute(nibbles_ptx(p), packed).view(np.int8)
    nibble = (packed.view(np.uint8) >> (4 * p)) & 15
    assert (found == 16 * (nibble.astype(np.int16) - 16 * (nibble > 7))).all()
