"""Instructions that only compute -> statements of numpy, for all threads of a cohort at once.

Each function takes an `Operands` and returns statements. A modifier that is not named here is an error: it would change
the result. `a.` is the module arithmetic.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from machine import arithmetic
from machine.program import Immediate, Instruction, Operand, PtxError, Vector

DTYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
HALVES = ("bf16", "f16")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


class Operands(Protocol):
    """The operands of one instruction as text."""

    instruction: Instruction
    kind: str  # the last part of the opcode

    def read(self, which: int | Operand, kind: str | None = None) -> str:
        """An operand as an array of a kind."""

    def write(self, value: str, kind: str | None = None, to: Operand = None) -> list[str]:
        """The statement that gives the first operand, or `to`, a value."""

    def constant(self, pattern: int, kind: str) -> str:
        """The name of a constant."""


def modifiers(operands: Operands, allowed: set[str]) -> set[str]:
    """The parts of an opcode between its name and its type."""
    parts = set(operands.instruction.parts[1:-1])
    if parts - allowed:
        raise PtxError(f"unknown instruction, {operands.instruction}")
    return parts


def integer(kind: str) -> bool:
    return kind[0] in "sub" and kind in DTYPES


def pattern(kind: str) -> str:
    return "b" + kind[1:]


def width(kind: str) -> int:
    return int(kind[1:])


# Moves ---------------------------------------------------------------------------------------------------------------


def mov(o: Operands) -> list[str]:
    """Also between a register and the parts of one."""
    modifiers(o, set())
    to, source = o.instruction.operands[:2]
    if isinstance(to, Vector):
        size = width(o.kind) // len(to.items)
        statements = [f"whole = {o.read(source)}"]
        for n, part in enumerate(to.items):
            if part is not None:
                shift = o.constant(n * size, o.kind)
                statements += o.write(f"(whole >> {shift}).astype(np.uint{size})", f"b{size}", part)
        return statements
    if isinstance(source, Vector):
        size = width(o.kind) // len(source.items)
        parts = (
            f"({o.read(part, f'b{size}')}.astype(np.uint{width(o.kind)}) << {o.constant(n * size, o.kind)})"
            for n, part in enumerate(source.items)
        )
        return o.write(" | ".join(parts))
    return o.write(o.read(1))


def cvta(o: Operands) -> list[str]:
    """Generic addresses are those of global memory and of parameters."""
    modifiers(o, {"to", "global", "param"})
    return o.write(o.read(1))


def selp(o: Operands) -> list[str]:
    modifiers(o, set())
    return o.write(f"np.where({o.read(3, 'pred')}, {o.read(1)}, {o.read(2)})")


# Integers ------------------------------------------------------------------------------------------------------------


def add_sub(o: Operands) -> list[str]:
    name = o.instruction.parts[0]
    if o.kind == "f32":
        return floats(o)
    if o.kind in ("s16x2", "u16x2") and name == "add":
        modifiers(o, set())
        return o.write(f"a.add_16x2({o.read(1, 'b32')}, {o.read(2, 'b32')})", "b32")
    modifiers(o, set())
    kind = pattern(o.kind)
    return o.write(f"{o.read(1, kind)} {'+' if name == 'add' else '-'} {o.read(2, kind)}", kind)


def mul_mad(o: Operands) -> list[str]:
    name = o.instruction.parts[0]
    if o.kind == "f32":
        return floats(o)
    (how,) = modifiers(o, {"lo", "hi", "wide"}) or {""}
    kind, add = o.kind, name == "mad"
    if how == "lo":
        kind = pattern(kind)
        product = f"{o.read(1, kind)} * {o.read(2, kind)}"
    elif how == "wide":
        kind = f"{kind[0]}{2 * width(kind)}"
        product = f"np.multiply({o.read(1)}, {o.read(2)}, dtype=np.{DTYPES[kind].__name__})"
    elif how == "hi" and width(kind) == 32:
        product = f"a.multiply_high({o.read(1)}, {o.read(2)})"
    else:
        raise PtxError(f"unknown instruction, {o.instruction}")
    return o.write(f"{product} + {o.read(3, kind)}" if add else product, kind)


def div_rem(o: Operands) -> list[str]:
    if o.kind == "f32":
        return floats(o)
    modifiers(o, set())
    if o.kind not in ("s32", "u32"):
        raise PtxError(f"unknown instruction, {o.instruction}")
    name = "divide" if o.instruction.parts[0] == "div" else "remainder"
    return o.write(f"a.{name}({o.read(1)}, {o.read(2)})")


def min_max(o: Operands) -> list[str]:
    if o.kind == "f32":
        return floats(o)
    modifiers(o, set())
    return o.write(f"np.{o.instruction.parts[0]}imum({o.read(1)}, {o.read(2)})")


def bitwise(o: Operands) -> list[str]:
    modifiers(o, set())
    sign = {"and": "&", "or": "|", "xor": "^"}[o.instruction.parts[0]]
    return o.write(f"{o.read(1)} {sign} {o.read(2)}")


def not_(o: Operands) -> list[str]:
    modifiers(o, set())
    return o.write(f"~{o.read(1)}")


def neg(o: Operands) -> list[str]:
    if o.kind == "f32":
        modifiers(o, set())
        return o.write(f"{o.read(1, 'b32')} ^ {o.constant(1 << 31, 'b32')}", "b32")
    modifiers(o, set())
    kind = pattern(o.kind)
    return o.write(f"~{o.read(1, kind)} + {o.constant(1, kind)}", kind)


def abs_(o: Operands) -> list[str]:
    modifiers(o, set())
    if o.kind == "f32":
        return o.write(f"{o.read(1, 'b32')} & {o.constant(0x7FFFFFFF, 'b32')}", "b32")
    return o.write(f"np.abs({o.read(1)})")


def shift(o: Operands) -> list[str]:
    modifiers(o, set())
    name, count = o.instruction.parts[0], o.instruction.operands[2]
    if isinstance(count, Immediate) and 0 <= count.pattern < width(o.kind):
        return o.write(f"{o.read(1)} {'<<' if name == 'shl' else '>>'} {o.constant(count.pattern, o.kind)}")
    return o.write(f"a.{name}({o.read(1)}, {o.read(2, 'u32')})")


def funnel_shift(o: Operands) -> list[str]:
    if o.instruction.opcode != "shf.l.wrap.b32":
        raise PtxError(f"unknown instruction, {o.instruction}")
    return o.write(f"a.shf_l_wrap({o.read(1)}, {o.read(2)}, {o.read(3)})")


def bfe(o: Operands) -> list[str]:
    modifiers(o, set())
    if width(o.kind) != 32:
        raise PtxError(f"unknown instruction, {o.instruction}")
    return o.write(f"a.bfe({o.read(1)}, {o.read(2, 'u32')}, {o.read(3, 'u32')})")


def prmt(o: Operands) -> list[str]:
    modifiers(o, set())
    return o.write(f"a.prmt({o.read(1)}, {o.read(2)}, {o.read(3)})")


def lop3(o: Operands) -> list[str]:
    modifiers(o, set())
    names = {"a": "first", "b": "second", "c": "third"}
    result = arithmetic.lop3()[o.instruction.operands[4].pattern].format(**names)
    return [f"{name} = {o.read(n)}" for n, name in enumerate(names.values(), 1) if name in result] + o.write(result)


def setp(o: Operands) -> list[str]:
    (how,) = modifiers(o, {*COMPARISONS, *UNSIGNED_COMPARISONS, *(f"{name}u" for name in COMPARISONS)}) or {""}
    left, right = o.read(1), o.read(2)
    if integer(o.kind):
        known = COMPARISONS | (UNSIGNED_COMPARISONS if o.kind[0] in "ub" else {})
        return o.write(f"{left} {known[how]} {right}", "pred")
    if o.kind != "f32":
        raise PtxError(f"unknown instruction, {o.instruction}")
    ordered = f"{left} {COMPARISONS[how.removesuffix('u')]} {right}"
    nan = f"(np.isnan({left}) | np.isnan({right}))"
    if how.endswith("u"):
        return o.write(f"({ordered}) | {nan}", "pred")
    return o.write(f"({ordered}) & ~{nan}" if how == "ne" else ordered, "pred")


# Floats --------------------------------------------------------------------------------------------------------------

# name -> modifiers that may stand there, result
FLOATS = {
    "add": ({"rn", "ftz"}, "a.canonical({} + {})"),
    "sub": ({"rn", "ftz"}, "a.canonical({} - {})"),
    "mul": ({"rn", "ftz"}, "a.canonical({} * {})"),
    "div": ({"rn", "full", "approx", "ftz"}, "a.canonical({} / {})"),
    "fma": ({"rn", "ftz"}, "a.fma_f32({}, {}, {})"),
    "min": ({"ftz"}, "a.minimum({}, {})"),
    "max": ({"ftz"}, "a.maximum({}, {})"),
    "min.NaN": ({"ftz"}, "a.minimum_nan({}, {})"),
    "max.NaN": ({"ftz"}, "a.maximum_nan({}, {})"),
    "ex2": ({"approx", "ftz"}, "a.exponential({})"),
    "lg2": ({"approx", "ftz"}, "a.logarithm({})"),
    "rcp": ({"approx", "rn", "ftz"}, "a.canonical(np.float32(1) / {})"),
    "sqrt": ({"approx", "rn", "ftz"}, "a.canonical(np.sqrt({}))"),
    "rsqrt": ({"approx", "ftz"}, "a.reciprocal_root({})"),
}


def floats(o: Operands) -> list[str]:
    name, parts = o.instruction.parts[0], o.instruction.parts
    if name == "fma" and o.kind in ("bf16x2", "f16x2"):
        modifiers(o, {"rn"})
        return o.write(f"a.fma_{o.kind}({o.read(1, 'b32')}, {o.read(2, 'b32')}, {o.read(3, 'b32')})", "b32")
    if o.kind != "f32":
        raise PtxError(f"unknown instruction, {o.instruction}")
    nan = "NaN" in parts
    allowed, result = FLOATS[f"{name}.NaN" if nan else name]
    found = modifiers(o, allowed | {"NaN", "sat"})
    values = [o.read(n) for n in range(1, len(o.instruction.operands))]
    if "ftz" in found:
        values = [f"a.flush({value})" for value in values]
    result = result.format(*values)
    if "ftz" in found:
        result = f"a.flush({result})"
    return o.write(f"a.limited({result})" if "sat" in found else result)


def cvt(o: Operands) -> list[str]:
    """Between integers; float32 to and from integers of at most 32 bits and 16-bit floats."""
    *_, to, source = o.instruction.parts
    how = set(o.instruction.parts[1:-2])
    unknown = PtxError(f"unknown instruction, {o.instruction}")
    value = o.read(1, source if source in DTYPES else "b16")
    if source == "f32" and to in ("bf16x2", "f16x2", *HALVES) and how == {"rn"}:
        half = to.removesuffix("x2")
        if to == half:
            return o.write(f"a.{half}_of({value})", "b16")
        return o.write(f"a.pair(a.{half}_of({value}), a.{half}_of({o.read(2, source)}))", "b32")
    if source in HALVES and to == "f32" and not how:
        return o.write(f"a.f32_of_{source}({value})", to)
    if integer(to) and integer(source) and how <= {"sat"}:
        dtype = DTYPES[to].__name__
        if how and "64" in source:
            raise unknown
        return o.write(f"a.saturate({value}, np.{dtype})" if how else f"{value}.astype(np.{dtype})", to)
    if integer(source) and to == "f32" and how == {"rn"}:
        return o.write(f"{value}.astype(np.float32)", to)
    rounding = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}
    if source == "f32" and integer(to) and width(to) <= 32 and len(how) == 1 and how <= rounding.keys():
        return o.write(f"a.integer_of(np.{rounding[how.pop()]}({value}), np.{DTYPES[to].__name__})", to)
    raise unknown


COMPUTED: dict[str, Callable[[Operands], list[str]]] = {
    "mov": mov, "cvta": cvta, "selp": selp, "add": add_sub, "sub": add_sub, "mul": mul_mad, "mad": mul_mad,
    "div": div_rem, "rem": div_rem, "min": min_max, "max": min_max, "and": bitwise, "or": bitwise, "xor": bitwise,
    "not": not_, "neg": neg, "abs": abs_, "shl": shift, "shr": shift, "shf": funnel_shift, "bfe": bfe, "prmt": prmt,
    "lop3": lop3, "setp": setp, "fma": floats, "ex2": floats, "lg2": floats, "rcp": floats, "sqrt": floats,
    "rsqrt": floats, "cvt": cvt,
}  # fmt: skip
