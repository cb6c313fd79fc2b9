"""Floats of the PTX machine against exact fractions, rounded as IEEE 754 defines it; NaN and zeros by the ISA."""

import math
from fractions import Fraction

import numpy as np
import pytest
from snippets import execute

F32, BF16, F16 = (24, -149, 127), (8, -133, 127), (11, -24, 15)  # digits, lowest bit, largest exponent
NAN, INFINITY = 0x7FFFFFFF, 0x7F800000
COUNT = 1024


def nearest(exact, form):
    """The number of a form that is nearest to a fraction, ties to even, infinite beyond the largest."""
    digits, lowest, top = form
    if exact == 0:
        return 0.0
    exponent = abs(exact).numerator.bit_length() - abs(exact).denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - digits + 1, lowest)
    rounded = round(exact / step) * step  # round is to even
    return math.copysign(math.inf, rounded) if abs(rounded) >= Fraction(2) ** (top + 1) else float(rounded)


def numbers(form, columns, seed=0):
    """float64 that a form holds, of all sizes, many with few digits: sums near ties, and some that cancel."""
    rng = np.random.default_rng(seed)
    digits, lowest, top = form
    values = rng.standard_normal((columns, COUNT)) * 2.0 ** rng.integers(-12, 12, (columns, COUNT))
    values[:, ::3] = rng.integers(-(2**digits), 2**digits, values[:, ::3].shape)
    values[:, 1::9] *= 2.0 ** (lowest // 2)  # products below the normal numbers
    values[0, 2::11] *= 2.0 ** (top // 2)
    if columns == 3:
        values[2, ::4] = -values[0, ::4] * values[1, ::4]
    return np.vectorize(lambda v: nearest(Fraction(float(v)), form))(np.clip(values, -(2.0**top), 2.0**top))


def bits(values, form):
    """float64 -> the pattern of what is equal in a form, uint32."""
    single = np.asarray(values, np.float64).astype(np.float32)
    if form is F16:
        return np.asarray(values, np.float64).astype(np.float16).view(np.uint16).astype(np.uint32)
    return single.view(np.uint32) >> np.uint32(16 if form is BF16 else 0)


def of_bits(patterns, form):
    patterns = np.asarray(patterns, np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        if form is F16:
            return patterns.astype(np.uint16).view(np.float16).astype(np.float64)
        return (patterns << np.uint32(16 if form is BF16 else 0)).view(np.float32).astype(np.float64)


OPERATIONS = {
    "add.f32": lambda a, b: a + b,
    "add.rn.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "mul.rn.f32": lambda a, b: a * b,
    "div.rn.f32": lambda a, b: a / b,
    "fma.rn.f32": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("opcode", OPERATIONS)
def test_float32_rounds_once(opcode):
    meaning = OPERATIONS[opcode]
    columns = numbers(F32, meaning.__code__.co_argcount)
    columns[1][columns[1] == 0] = 1
    sources = ", ".join(f"%i{n}" for n in range(len(columns)))
    got = execute(f"{opcode} %o0, {sources};", [bits(c, F32) for c in columns], threads=COUNT).outputs[:, 0]
    for row, result in zip(columns.T, of_bits(got, F32), strict=True):
        assert result == nearest(meaning(*map(Fraction, row.tolist())), F32), row


@pytest.mark.parametrize("kind, form", [("bf16x2", BF16), ("f16x2", F16)])
def test_fma_of_pairs_rounds_once(kind, form):
    low, high = numbers(form, 3), numbers(form, 3, seed=1)
    words = [bits(a, form) | bits(b, form) << np.uint32(16) for a, b in zip(low, high, strict=True)]
    got = execute(f"fma.rn.{kind} %o0, %i0, %i1, %i2;", words, threads=COUNT).outputs[:, 0]
    for columns, patterns in ((low, got & 0xFFFF), (high, got >> np.uint32(16))):
        for row, result in zip(columns.T, of_bits(patterns, form), strict=True):
            a, b, c = map(Fraction, row.tolist())
            assert result == nearest(a * b + c, form), row


@pytest.mark.parametrize("kind, form", [("bf16", BF16), ("f16", F16)])
def test_conversions_to_16_bits(kind, form):
    """All ties between neighbours, and their neighbours in float32."""
    every = np.arange(0, 0x8000, 31, dtype=np.uint32)
    every = every[~np.isnan(of_bits(every, form)) & ~np.isinf(of_bits(every, form))]
    tie = (of_bits(every, form) + of_bits(every + 1, form)) / 2
    tie = tie[np.isfinite(tie)].astype(np.float32)
    values = np.concatenate([tie, np.nextafter(tie, np.float32(np.inf)), np.nextafter(tie, np.float32(0)), -tie])
    values = np.pad(values, (0, -len(values) % 32))
    body = f"cvt.rn.{kind}.f32 %rs0, %i0;\nmov.b32 %o0, {{ %rs0, %rs0 }};\ncvt.rn.{kind}x2.f32 %o1, %i0, %i1;"
    got = execute(body, [values, values[::-1].copy()], 2, threads=len(values)).outputs
    want = [nearest(Fraction(v), form) for v in values.tolist()]
    assert of_bits(got[:, 0] & 0xFFFF, form).tolist() == want
    # of a pair the first source is the upper half
    assert of_bits(got[:, 1] >> np.uint32(16), form).tolist() == want
    assert of_bits(got[:, 1] & 0xFFFF, form).tolist() == want[::-1]


@pytest.mark.parametrize("kind, form", [("bf16", BF16), ("f16", F16)])
def test_conversions_from_16_bits(kind, form):
    every = np.arange(0, 2**16, 64, dtype=np.uint32) + 3
    got = execute(f"mov.b32 {{ %rs0, _ }}, %i0;\ncvt.f32.{kind} %o0, %rs0;", [every], threads=len(every)).outputs[:, 0]
    np.testing.assert_array_equal(of_bits(got, F32), of_bits(every, form))


def test_conversions_between_float32_and_integers():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(400) * 2.0 ** rng.integers(-3, 36, 400),
            np.arange(-50, 50) / 2,
            [2.0**31, -(2.0**31), 2.0**32],
        ]
    ).astype(np.float32)
    values = np.concatenate([values, np.array([np.inf, -np.inf, -0.0, 1e38, np.nan], np.float32)])
    values = np.pad(values, (0, -len(values) % 32))
    body = "\n".join(
        f"cvt.{mode}.{kind}.f32 %o{n}, %i0;"
        for n, (mode, kind) in enumerate((m, k) for m in ("rzi", "rni", "rmi", "rpi") for k in ("s32", "u32"))
    )
    got = execute(body, [values], 8, threads=len(values)).outputs
    modes = [math.trunc, round, math.floor, math.ceil]
    for value, row in zip(values.tolist(), got, strict=True):
        for n, answer in enumerate(row):
            low, high = (-(2**31), 2**31 - 1) if n % 2 == 0 else (0, 2**32 - 1)
            whole = 0 if math.isnan(value) else value if math.isinf(value) else modes[n // 2](value)
            assert int(answer) == int(max(low, min(high, whole))) & 2**32 - 1, (value, n)

    integers = rng.integers(0, 2**32, 256, dtype=np.uint32)
    got = execute("cvt.rn.f32.s32 %o0, %i0;\ncvt.rn.f32.u32 %o1, %i0;", [integers], 2, threads=256).outputs
    for a, (as_signed, as_unsigned) in zip(integers.tolist(), of_bits(got, F32), strict=True):
        assert as_signed == nearest(Fraction(a - 2**32 * (a >> 31)), F32)
        assert as_unsigned == nearest(Fraction(a), F32)


SPECIAL = np.array([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan], np.float32)


def pairs_of_special():
    a, b = (grid.ravel() for grid in np.meshgrid(SPECIAL, SPECIAL))
    return [np.pad(column, (0, -len(column) % 32)) for column in (a, b)]


@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_smallest_and_largest(name):
    """ISA 9.7.3.11: of a number and a NaN the number, unless .NaN; -0 is below +0; a NaN result is canonical."""
    columns = pairs_of_special()
    got = execute(f"{name}.f32 %o0, %i0, %i1;", columns, threads=len(columns[0])).outputs[:, 0]
    for a, b, answer in zip(*map(np.ndarray.tolist, columns), got.tolist(), strict=True):
        present = [v for v in (a, b) if not math.isnan(v)]
        if not present or ("NaN" in name and len(present) < 2):
            assert answer == NAN
            continue
        order = sorted(present, key=lambda v: (v, math.copysign(1, v)))
        want = np.float32(order[0] if name.startswith("min") else order[-1])
        assert answer == want.view(np.uint32), (a, b)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons(name):
    """Of a NaN nothing is true, and everything that ends in u."""
    columns = pairs_of_special()
    body = f"setp.{name}.f32 %p1, %i0, %i1;\nselp.f32 %o0, 0f3F800000, 0f00000000, %p1;"
    got = execute(body, columns, threads=len(columns[0])).outputs[:, 0]
    compare = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
    for a, b, answer in zip(*map(np.ndarray.tolist, columns), of_bits(got, F32).tolist(), strict=True):
        unordered = math.isnan(a) or math.isnan(b)
        assert answer == (name.endswith("u") if unordered else getattr(a, compare[name[:2]])(b)), (a, b)


def test_nan_results_are_canonical():
    """Whatever NaN went in."""
    nan = np.full(32, 0xFFC12345, np.uint32)
    one = np.full(32, 1.0, np.float32)
    body = """
      add.f32 %o0, %i0, %i1;
      mul.f32 %o1, %i0, %i1;
      fma.rn.f32 %o2, %i0, %i1, %i1;
      fma.rn.bf16x2 %o3, %i0, %i1, %i1;
      fma.rn.f16x2 %o4, %i2, %i1, %i1;
      cvt.rn.bf16x2.f32 %o5, %i0, %i0;
      cvt.rn.f16x2.f32 %o6, %i0, %i0;
      ex2.approx.f32 %o7, %i0;
    """
    half_nan = np.full(32, 0xFE00FE01, np.uint32)
    got = execute(body, [nan, one, half_nan], 8).outputs[0]
    assert got[[0, 1, 2, 7]].tolist() == [NAN] * 4
    assert got[3] >> 16 == 0x7FFF and got[4:7].tolist() == [0x7FFF7FFF] * 3


def test_signs():
    values = pairs_of_special()[0]
    got = execute("neg.f32 %o0, %i0;\nabs.f32 %o1, %i0;", [values], 2, threads=len(values)).outputs
    bits_in = values.view(np.uint32)
    assert (got[:, 0] == bits_in ^ np.uint32(1 << 31)).all() and (got[:, 1] == bits_in & np.uint32(0x7FFFFFFF)).all()


@pytest.mark.parametrize(
    "opcode, meaning",
    [
        ("ex2.approx.f32", lambda v: 2.0**v),
        ("ex2.approx.ftz.f32", lambda v: 2.0**v),
        ("lg2.approx.f32", lambda v: math.log2(abs(v))),
        ("rcp.approx.ftz.f32", lambda v: 1 / v),
        ("rcp.rn.f32", lambda v: 1 / v),
        ("sqrt.rn.f32", lambda v: math.sqrt(abs(v))),
        ("sqrt.approx.f32", lambda v: math.sqrt(abs(v))),
        ("rsqrt.approx.ftz.f32", lambda v: 1 / math.sqrt(abs(v))),
        ("div.full.f32", lambda v: 3 / v),
    ],
)
def test_functions(opcode, meaning):
    """Exact but for the last bit, better than the ISA promises."""
    values = (np.random.default_rng(0).standard_normal(256) * 8).astype(np.float32)
    source = "%i0" if opcode.startswith(("ex2", "rcp")) else "%o1"
    body = f"abs.f32 %o1, %i0;\n{opcode} %o0, {source};"
    if opcode.startswith("div"):
        body = f"abs.f32 %o1, %i0;\n{opcode} %o0, 0f40400000, %i0;"
    got = of_bits(execute(body, [values], 2, threads=256).outputs[:, 0], F32)
    want = np.array([meaning(v) for v in values.tolist()])
    assert (np.abs(got - want) <= 2.0**-23 * np.abs(want)).all()


def test_subnormals_are_flushed_where_the_opcode_says_so():
    tiny = np.full(32, 0x80000123, np.uint32)
    body = "add.ftz.f32 %o0, %i0, %i0;\nadd.f32 %o1, %i0, %i0;\nmul.ftz.f32 %o2, %i1, %i1;"
    got = execute(body, [tiny, np.full(32, 2.0**-70, np.float32)], 3).outputs[0]
    assert got.tolist() == [0x80000000, 0x80000246, 0]


def test_saturated_floats():
    values = np.pad(SPECIAL, (0, 25), constant_values=0.25)
    got = of_bits(execute("add.sat.f32 %o0, %i0, 0f00000000;", [values]).outputs[:, 0], F32)
    want = [0 if math.isnan(v) else max(0.0, min(1.0, v)) for v in values.tolist()]
    assert got.tolist() == want
