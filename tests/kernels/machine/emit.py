"""A program -> Python functions, one for each segment, that run it for all threads of a cohort at once.

A segment ends at a label, at a jump, and wherever threads meet or may change places. What only computes becomes lines
of numpy on rows of registers; what touches memory, other threads or the order of things calls a unit of the processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from machine import arithmetic
from machine.expressions import COMPUTED, DTYPES
from machine.program import Immediate, Instruction, Operand, Program, PtxError, Register, Symbol, Vector
from machine.threads import Unit

SHARED_BASE = 1024  # where dynamic shared memory starts in the shared window
PARAMETER_BASE = 1 << 20
# Views of the register files, by register file and first letter of a type
VIEWS = {
    ("pred", "p"): "pred", ("b16", "b"): "b16", ("b16", "u"): "b16", ("b16", "s"): "s16", ("b32", "b"): "b32",
    ("b32", "u"): "b32", ("b32", "s"): "s32", ("b32", "f"): "f32", ("b64", "b"): "b64", ("b64", "u"): "b64",
    ("b64", "s"): "s64", ("b64", "f"): "f64",
}  # fmt: skip
VIEW_NAMES = ("pred", "b16", "s16", "b32", "s32", "f32", "b64", "s64", "f64")
# After these the scheduler may let others go first
POINTS = ("atom", "red", "mbarrier", "cp.async.wait_group", "cp.async.wait_all", "cp.async.bulk", "wgmma.wait_group")

Segment = Callable[[Any, Any], int | None]  # (wave, cohort) -> the next segment, or None if the scheduler decides


@dataclass
class Compiled:
    """segments: functions; starts: number of the first instruction of each; apart: segments of atomics, from which
    other CTAs may learn who was first."""

    program: Program
    segments: list[Segment]
    starts: list[int]
    apart: set[int]
    wgmma_rows: set[int]  # rows of 32-bit registers that wgmmas take operands from

    def instructions(self, segment: int) -> list[Instruction]:
        return self.program.code[self.starts[segment] : [*self.starts, len(self.program.code)][segment + 1]]


def compile_program(program: Program, units: dict[str, type[Unit]]) -> Compiled:
    """units: attribute of a wave -> class. Raises PtxError for an instruction that nobody knows."""
    return _Emitter(program, units).compiled()


class _Operands:
    """The operands of one instruction, as text of Python."""

    def __init__(self, emitter: "_Emitter", instruction: Instruction):
        self.emitter, self.instruction = emitter, instruction
        self.kind = instruction.parts[-1]

    def read(self, which: int | Operand, kind: str | None = None) -> str:
        operand = self.instruction.operands[which] if isinstance(which, int) else which
        kind = kind or self.kind
        if isinstance(operand, Immediate):
            return self.constant(operand.pattern, kind)
        if isinstance(operand, Symbol):
            if operand.name.startswith("%"):
                return f"wave.special[{operand.name!r}][columns]"
            return self.constant(symbol_address(self.emitter.program, operand.name), kind)
        text = f"{VIEWS[operand.file, kind[0]]}[{operand.row}][columns]"
        if operand.file not in ("pred", f"b{kind[1:]}"):  # a register may be wider than what is read from it
            text = f"{text}.astype(np.{DTYPES[kind].__name__})"
        return text

    def write(self, value: str, kind: str | None = None, to: Operand = None) -> list[str]:
        to = self.instruction.operands[0] if to is None else to
        kind = kind or self.kind
        return [f"{VIEWS[to.file, kind[0]]}[{to.row}][columns] = {value}"] if to is not None else []

    def constant(self, pattern: int, kind: str) -> str:
        return self.emitter.constant(pattern, kind)


def symbol_address(program: Program, name: str) -> int:
    """The address of shared memory or of a parameter."""
    if name == "global_smem":
        return SHARED_BASE
    offsets, _ = program.parameter_offsets()
    if name not in offsets:
        raise PtxError(f"unknown symbol {name}")
    return PARAMETER_BASE + offsets[name]


class _Emitter:
    def __init__(self, program: Program, units: dict[str, type[Unit]]):
        self.program = program
        self.calls = {op: (unit, name) for unit, made in units.items() for op, name in made.OPCODES.items()}
        self.meetings = {op: (unit, name) for unit, made in units.items() for op, name in made.MEETINGS.items()}
        self.namespace = {"np": np, "a": arithmetic, "code": program.code}
        self.constants: dict[tuple[str, bytes], str] = {}
        self.wgmma_rows = {
            register.row
            for i in program.code if i.has("wgmma.mma_async")
            for vector in i.operands[:2] if isinstance(vector, Vector)
            for register in vector.items
        }  # fmt: skip

    def constant(self, pattern: int, kind: str) -> str:
        dtype = np.dtype(DTYPES[kind])
        if kind == "pred":
            value = np.bool_(pattern != 0)
        else:
            raw = (pattern & (1 << 8 * dtype.itemsize) - 1).to_bytes(dtype.itemsize, "little")
            value = np.frombuffer(raw, dtype)[0]
        name = self.constants.setdefault((kind, value.tobytes()), f"k{len(self.constants)}")
        self.namespace[name] = value
        return name

    def compiled(self) -> Compiled:
        code = self.program.code
        starts = {0, *self.program.labels.values()}
        for i in code:
            if self.is_meeting(i) or self.is_jump(i) or i.of(POINTS):
                starts |= {i.number, i.number + 1}
        self.starts = sorted(start for start in starts if start < len(code))
        self.segment_at = {start: n for n, start in enumerate(self.starts)}
        apart = {n for n, start in enumerate(self.starts) if code[start].parts[0] in ("atom", "red")}
        compiled = Compiled(self.program, [], self.starts, apart, self.wgmma_rows)
        source = "\n".join(self.function(n, compiled.instructions(n)) for n in range(len(self.starts)))
        exec(compile(source, f"<{self.program.name}>", "exec"), self.namespace)
        compiled.segments = [self.namespace[f"segment{n}"] for n in range(len(self.starts))]
        return compiled

    @staticmethod
    def is_jump(i: Instruction) -> bool:
        return i.parts[0] in ("bra", "brx", "ret", "exit")

    def is_meeting(self, i: Instruction) -> bool:
        return i.of(self.meetings) is not None

    def function(self, n: int, instructions: list[Instruction]) -> str:
        lines = [
            f"def segment{n}(wave, cohort):",
            f" {', '.join(VIEW_NAMES)} = wave.views",
            " columns = cohort.columns",
        ]
        for i in instructions:
            if self.is_jump(i) or self.is_meeting(i):
                lines.append(f" return {self.jump(i, n + 1) if self.is_jump(i) else self.meeting(i, n + 1)}")
                break
            statements = self.watch(i) + self.statements(i)
            if i.guard is None:
                lines += [f" {statement}" for statement in statements]
                continue
            lines.append(f" guarded = wave.guarded(cohort, pred[{i.guard.row}], {i.negated})")
            lines.append(" if guarded is not None:")
            lines.append("  columns = guarded.columns")
            lines += [f"  {statement}" for statement in statements]
            lines.append(" columns = cohort.columns")
        else:
            pause = any(i.of(POINTS) for i in instructions)
            lines.append(f" return wave.pause(cohort, {n + 1})" if pause else f" return {n + 1}")
        return "\n".join(lines)

    def statements(self, i: Instruction) -> list[str]:
        """One instruction that does not end a segment."""
        if opcode := i.of(self.calls):
            unit, method = self.calls[opcode]
            return [f"wave.{unit}.{method}(code[{i.number}], {'cohort' if i.guard is None else 'guarded'})"]
        if i.parts[0] not in COMPUTED and not i.has("ld.param"):
            raise PtxError(f"unknown instruction, {i}")
        operands = _Operands(self, i)
        try:
            if i.has("ld.param"):
                source = i.operands[1]
                symbol_address(self.program, source.base.name)
                return operands.write(f"wave.parameter({source.base.name!r}, {source.offset}, {operands.kind!r})")
            return COMPUTED[i.parts[0]](operands)
        except (LookupError, ValueError, AttributeError) as error:  # a type, a modifier or an operand of no table
            raise PtxError(f"unknown instruction, {i}") from error

    def watch(self, i: Instruction) -> list[str]:
        """Registers of a wgmma that may still be running, or has not been fenced off."""
        if not self.wgmma_rows or i.parts[0] == "wgmma":
            return []

        def rows(operand: Operand) -> list[int]:
            items = operand.items if isinstance(operand, Vector) else (operand,)
            found = [r.row for r in items if isinstance(r, Register) and r.file == "b32"]
            return [row for row in found if row in self.wgmma_rows]

        stores = i.parts[0] in ("st", "stmatrix", "setp")
        results = 0 if stores else 1  # operands that are written
        written = [row for operand in i.operands[:results] for row in rows(operand)]
        read = [row for operand in i.operands[results:] for row in rows(operand)]
        if not written and not read:
            return []
        cohort = "cohort" if i.guard is None else "guarded"
        return [f"wave.wgmma.touch(code[{i.number}], {cohort}, {written}, {read})"]

    def meeting(self, i: Instruction, following: int) -> str:
        if i.guard is not None:
            raise PtxError(f"unknown with a guard, {i}")
        unit, method = self.meetings[i.of(self.meetings)]
        return f"wave.{unit}.{method}(code[{i.number}], cohort, {following})"

    def target(self, label: str) -> int:
        if label not in self.program.labels:
            raise PtxError(f"no label {label}")
        return self.segment_at[self.program.labels[label]]

    def jump(self, i: Instruction, following: int) -> str:
        """What a segment that ends with a jump returns."""
        if i.opcode in ("bra", "bra.uni"):
            target = self.target(i.operands[0].name)
            return (
                f"wave.branch(cohort, pred[{i.guard.row}], {i.negated}, {target}, {following})" if i.guard else target
            )
        if i.opcode == "brx.idx" and not i.guard:
            targets = [self.target(name) for name in self.program.branch_targets[i.operands[1].name]]
            return f"wave.branch_by_table(code[{i.number}], cohort, {targets})"
        if i.opcode in ("ret", "exit") and not i.guard:
            return "wave.leave(cohort)"
        raise PtxError(f"unknown instruction, {i}")
