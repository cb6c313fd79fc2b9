"""Integers and bits of the PTX machine against their definition in the PTX ISA, number by number in Python."""

import itertools

import numpy as np
import pytest
from machine.program import PtxError
from snippets import execute

M32 = 2**32 - 1
EDGES = [0, 1, 2, 7, 31, 32, 33, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def signed(a, bits=32):
    return a - (1 << bits) if a >> (bits - 1) & 1 else a


def quotient(a, b):
    sign = -1 if (a < 0) != (b < 0) else 1
    return sign * (abs(a) // abs(b)) if b else -1


def field(a, position, length, is_signed):
    """bfe, bit by bit, as the ISA has it."""
    position, length = position & 255, length & 255
    sign = a >> min(position + length - 1, 31) & 1 if is_signed and length else 0
    bits = [a >> (position + i) & 1 if i < length and position + i <= 31 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a, b, selector):
    """prmt, byte by byte."""
    all_bytes = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = all_bytes[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def funnel(low, high, count):
    return (((high << 32 | low) << (count & 31)) >> 32) & M32


def halves(operation, a, b):
    return operation(a & 0xFFFF, b & 0xFFFF) & 0xFFFF | (operation(a >> 16, b >> 16) & 0xFFFF) << 16


BINARY = {
    "add.s32": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.lo.u32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "div.s32": lambda a, b: quotient(signed(a), signed(b)),
    "div.u32": lambda a, b: a // b if b else -1,
    "rem.s32": lambda a, b: signed(a) - signed(b) * quotient(signed(a), signed(b)),
    "rem.u32": lambda a, b: a % b if b else a - b * -1,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.b32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "add.s16x2": lambda a, b: halves(lambda x, y: x + y, a, b),
    "add.u16x2": lambda a, b: halves(lambda x, y: x + y, a, b),
}
UNARY = {
    "not.b32": lambda a: ~a,
    "neg.s32": lambda a: -a,
    "abs.s32": lambda a: abs(signed(a)),
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
}
TERNARY = {
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "bfe.u32": lambda a, b, c: field(a, b, c, False),
    "bfe.s32": lambda a, b, c: field(a, b, c, True),
    "prmt.b32": permuted,
    "shf.l.wrap.b32": funnel,
}


def drawn(count, columns):
    """Random numbers of all sizes, and edges: uint32 [columns][count]."""
    rng = np.random.default_rng(count + columns)
    values = rng.integers(0, 2**32, (columns, count), dtype=np.uint64) >> rng.integers(0, 32, (columns, count)).astype(
        "u8"
    )
    values[:, : count // 2] = rng.choice(EDGES, (columns, count // 2))
    return list(values.astype(np.uint32))


@pytest.mark.parametrize(
    "opcode, meaning",
    [*UNARY.items(), *BINARY.items(), *TERNARY.items()],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_integers(opcode, meaning):
    count = meaning.__code__.co_argcount if hasattr(meaning, "__code__") else 2
    columns = drawn(1024, count)
    sources = ", ".join(f"%i{n}" for n in range(count))
    got = execute(f"{opcode} %o0, {sources};", columns, threads=1024).outputs[:, 0]
    assert got.tolist() == [meaning(*map(int, row)) & M32 for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("opcode", ["bfe.u32", "bfe.s32"])
def test_fields_at_every_place(opcode):
    pairs = list(itertools.product((0, 1, 5, 28, 31, 32, 40, 255, 256), repeat=2))
    for number in (0x80000001, 0x7FFFFFFE, 0xDEADBEEF):
        columns = [np.full(len(pairs), number, np.uint32), *np.array(pairs, np.uint32).T]
        columns = [np.pad(column, (0, -len(column) % 32)) for column in columns]
        got = execute(f"{opcode} %o0, %i0, %i1, %i2;", columns, threads=len(columns[0])).outputs[:, 0]
        want = [field(*map(int, row), opcode == "bfe.s32") for row in zip(*columns, strict=True)]
        assert got.tolist() == want


def test_every_table_of_lop3():
    """Bit i of the table answers a, b, c with the bits 2, 1, 0 of i."""
    columns = drawn(64, 3)
    body = "\n".join(f"lop3.b32 %o{table}, %i0, %i1, %i2, {table:#x};" for table in range(256))
    got = execute(body, columns, 256, threads=64).outputs
    for row, answers in zip(zip(*columns, strict=True), got, strict=True):
        index = [sum((int(v) >> bit & 1) << (2 - n) for n, v in enumerate(row)) for bit in range(32)]
        want = [sum((table >> index[bit] & 1) << bit for bit in range(32)) for table in range(256)]
        assert answers.tolist() == want


@pytest.mark.parametrize(
    "opcode, meaning",
    [
        ("mul.wide.s32", lambda a, b: signed(a) * signed(b)),
        ("mul.wide.u32", lambda a, b: a * b),
        ("mul.lo.s64", lambda a, b: a * b),
        ("add.s64", lambda a, b: a + b),
        ("sub.s64", lambda a, b: a - b),
        ("min.s64", min),
        ("max.s64", max),
        ("shl.b64", lambda a, b: a << b if b < 64 else 0),
        ("shr.u64", lambda a, b: a >> b if b < 64 else 0),
    ],
)
def test_wide_integers(opcode, meaning):
    columns = drawn(256, 2)
    second = "%i1" if "wide" in opcode or opcode.startswith("sh") else "%rd2"
    first = "%i0" if "wide" in opcode else "%rd1"
    body = f"""
      cvt.u64.u32 %rd1, %i0;
      cvt.u64.u32 %rd2, %i1;
      {opcode} %rd3, {first}, {second};
      mov.b64 {{ %o0, %o1 }}, %rd3;
    """
    got = execute(body, columns, 2, threads=256).outputs
    for (a, b), (low, high) in zip(zip(*columns, strict=True), got, strict=True):
        assert int(low) | int(high) << 32 == meaning(int(a), int(b)) & 2**64 - 1


@pytest.mark.parametrize("opcode, signs", [("mad.wide.s32", True), ("mad.wide.u32", False)])
def test_multiply_add_wide(opcode, signs):
    columns = drawn(64, 3)
    body = f"cvt.u64.u32 %rd1, %i2;\n{opcode} %rd3, %i0, %i1, %rd1;\nmov.b64 {{ %o0, %o1 }}, %rd3;"
    got = execute(body, columns, 2, threads=64).outputs
    for (a, b, c), (low, high) in zip(zip(*columns, strict=True), got, strict=True):
        product = signed(int(a)) * signed(int(b)) if signs else int(a) * int(b)
        assert int(low) | int(high) << 32 == (product + int(c)) & 2**64 - 1


@pytest.mark.parametrize("opcode, signs", [("mul.wide.u16", False), ("mul.wide.s16", True)])
def test_sixteen_bits(opcode, signs):
    columns = drawn(128, 2)
    body = f"cvt.u16.u32 %rs0, %i0;\ncvt.u16.u32 %rs1, %i1;\n{opcode} %o0, %rs0, %rs1;\nmov.b32 %o1, {{ %rs0, %rs1 }};"
    got = execute(body, columns, 2, threads=128).outputs
    for (a, b), (product, packed) in zip(zip(*columns, strict=True), got, strict=True):
        a, b = int(a) & 0xFFFF, int(b) & 0xFFFF
        assert packed == a | b << 16
        assert product == ((signed(a, 16) * signed(b, 16)) if signs else a * b) & M32


COMPARED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", [*COMPARED, "lo", "ls", "hi", "hs"])
def test_comparisons(name):
    columns = drawn(256, 2)
    alias = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    kinds = ["u32"] if name in alias else ["u32", "s32", "b32"] if name in ("eq", "ne") else ["u32", "s32"]
    for kind in kinds:
        got = execute(f"setp.{name}.{kind} %p1, %i0, %i1;\nselp.b32 %o0, 1, 0, %p1;", columns, threads=256).outputs
        of = signed if kind == "s32" else int
        want = [COMPARED[alias.get(name, name)](of(int(a)), of(int(b))) for a, b in zip(*columns, strict=True)]
        assert got[:, 0].tolist() == want


def test_predicates_and_guards():
    body = """
      setp.lt.u32 %p1, %i0, 8;
      setp.gt.u32 %p2, %i0, 3;
      and.pred %p3, %p1, %p2;
      or.pred %p4, %p1, %p2;
      xor.pred %p5, %p1, %p2;
      not.pred %p6, %p3;
      mov.pred %p7, %p6;
      mov.b32 %o0, 0;
      @%p3 or.b32 %o0, %o0, 1;
      @!%p4 or.b32 %o0, %o0, 2;
      @%p5 or.b32 %o0, %o0, 4;
      @%p7 or.b32 %o0, %o0, 8;
    """
    numbers = np.arange(32, dtype=np.uint32)
    low, high = numbers < 8, numbers > 3
    want = (low & high) * 1 + ~(low | high) * 2 + (low ^ high) * 4 + ~(low & high) * 8
    assert execute(body, [numbers]).outputs[:, 0].tolist() == want.tolist()


@pytest.mark.parametrize(
    "opcode, meaning",
    [
        ("cvt.s32.s16", lambda a: signed(a & 0xFFFF, 16)),
        ("cvt.u32.u16", lambda a: a & 0xFFFF),
        ("cvt.s32.s8", lambda a: signed(a & 0xFF, 8)),
        ("cvt.u32.u8", lambda a: a & 0xFF),
        ("cvt.sat.s8.s32", lambda a: max(-128, min(127, signed(a)))),
        ("cvt.sat.u8.s32", lambda a: max(0, min(255, signed(a)))),
    ],
)
def test_conversions_of_integers(opcode, meaning):
    (column,) = drawn(256, 1)
    narrow = opcode.endswith(("16", "8"))
    to = "%rs1" if opcode.split(".")[-2] in ("s8", "u8") else "%o0"
    body = f"cvt.u16.u32 %rs0, %i0;\n{opcode} {to}, {'%rs0' if narrow else '%i0'};"
    body += f"\ncvt.s32.s16 %o0, {to};" if to == "%rs1" else ""
    got = execute(body, [column], threads=256).outputs[:, 0]
    assert got.tolist() == [meaning(int(a)) & M32 for a in column]


def test_conversions_to_64_bits_and_back():
    (column,) = drawn(256, 1)
    body = """
      cvt.s64.s32 %rd1, %i0;
      cvta.to.global.u64 %rd2, %rd1;
      mov.b64 { %o0, %o1 }, %rd2;
      cvt.u32.u64 %o2, %rd1;
      mov.b64 %rd3, { %o2, %o1 };
      mov.b64 { _, %o3 }, %rd3;
    """
    got = execute(body, [column], 4, threads=256).outputs
    for a, (low, high, back, again) in zip(column, got, strict=True):
        whole = signed(int(a)) & 2**64 - 1
        assert (int(low), int(high), int(back), int(again)) == (whole & M32, whole >> 32, int(a), whole >> 32)


@pytest.mark.parametrize(
    "text",
    [
        "clz.b32 %o0, %i0;",
        "add.sat.s32 %o0, %i0, %i1;",
        "mul24.lo.s32 %o0, %i0, %i1;",
        "fma.rz.f32 %o0, %i0, %i1, %i0;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs0, %i0, %i1;",
        "cvt.rz.f32.s32 %o0, %i0;",
        "setp.lt.and.s32 %p1, %i0, %i1, %p2;",
        "setp.lo.s32 %p1, %i0, %i1;",
        "mul.f64 %rd0, %rd1, %rd2;",
        "ld.local.b32 %o0, [%r1];",
        "shfl.sync.idx.b64 %o0, %i0, %i1, 31, -1;",
        "atom.shared.add.u32 %o0, [%r1], 1;",
        "red.global.add.u32 [%in], 1;",
        "tcgen05.alloc.sync.aligned.b32 [%r1], 64;",
        "@%p1 ret;",
    ],
)
def test_unknown_instructions_are_errors_that_name_them(text):
    with pytest.raises(PtxError) as error:
        execute(text, [np.zeros(32, np.uint32), np.zeros(32, np.uint32)])
    assert text.removesuffix(";") in str(error.value)
