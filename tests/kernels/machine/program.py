"""PTX text -> instructions with typed operands (PTX ISA, chapters 4 to 6).

What Triton emits is understood; anything else is a PtxError that names the line. Registers that an inline-assembly
block `{ .reg ... }` declares are local to it, and so are its labels; blocks that follow each other share rows.
"""

import bisect
import functools
import re
import struct
from collections.abc import Container
from dataclasses import dataclass, field

LONGEST = 120  # characters of an instruction in a message
# .reg types by what holds them; signed, unsigned and float registers are bit patterns as well
REGISTER_FILES = ("pred", "b16", "b32", "b64")


class PtxError(Exception):
    """PTX that this machine cannot read, or an instruction it does not know."""


@dataclass(frozen=True)
class Register:
    file: str  # one of REGISTER_FILES
    row: int
    name: str


@dataclass(frozen=True)
class Immediate:
    pattern: int  # two's complement of any width, or the bits of a float


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int = 0
    coordinates: tuple = ()  # of a tensor map


Operand = Register | Immediate | Symbol | Vector | Address | None


@functools.cache
def prefixes(opcode: str) -> tuple[str, ...]:
    """An opcode without its last modifiers, the longest first: a.b.c, a.b, a."""
    parts = opcode.split(".")
    return tuple(".".join(parts[:n]) for n in range(len(parts), 0, -1))


@dataclass
class Instruction:
    number: int
    opcode: str
    operands: list[Operand]
    guard: Register | None
    negated: bool
    line: int
    text: str

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")

    def __str__(self) -> str:
        text = self.text if len(self.text) <= LONGEST else f"{self.text[:LONGEST]} ..."
        return f"line {self.line}: {text}"

    def has(self, prefix: str) -> bool:
        """Is the opcode this one, perhaps with more modifiers? `ldmatrix` has no `ld`."""
        return prefix in prefixes(self.opcode)

    def of(self, names: Container[str]) -> str | None:
        """The one of `names`, a set or dict of opcodes, that this has with the most modifiers."""
        return next((prefix for prefix in prefixes(self.opcode) if prefix in names), None)


@dataclass
class Program:
    """One kernel. parameters: (name, bytes) in order. labels: name -> number of the instruction they stand before."""

    name: str
    parameters: list[tuple[str, int]] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REGISTER_FILES, 0))
    threads: int = 0  # of a CTA
    max_registers: int = 0  # of a thread, 0 if the kernel does not say

    def parameter_offsets(self) -> tuple[dict[str, int], int]:
        """Where each parameter starts, naturally aligned (a tensor map at 64 bytes), and how many bytes all take."""
        offsets, end = {}, 0
        for name, size in self.parameters:
            align = 64 if size > 8 else size
            offsets[name] = -(-end // align) * align
            end = offsets[name] + size
        return offsets, end


def parse(text: str) -> Program:
    """The one kernel of a PTX module. Raises PtxError."""
    return _Parser(text).parse()


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    if not ("{" in text or "[" in text):
        return text.split(",") if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]] * bool(text[start:].strip())


def pattern_of(text: str) -> int:
    """The bits of an immediate: 12, -1, 0x7F, 0f3F800000 (float32), 0d3FF0000000000000 (float64), 1.5 (float32)."""
    text = text.strip()
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return struct.unpack("<I", struct.pack("<f", float(text)))[0]


# What a statement starts with, if it is no instruction
_STATEMENT = re.compile(
    r"""\s*(?: (?P<begin> \{ ) | (?P<end> \} ) | (?P<nothing> ; | \.(?:loc|file)\b[^\n]*\n | \.pragma[^;]*; )
    | (?P<targets> [\w$]+ ) \s*:\s* \.branchtargets | (?P<label> [\w$]+ ) \s*:(?!:)
    | \.reg\s+\.(?P<registers> \w+ )\s+ )?""",
    re.VERBOSE,
)
_GUARD = re.compile(r"@(!?)([\w%$]+)\s+")
_OFFSET = re.compile(r"(.+?)\s*\+\s*(-?\w+)")


class _Parser:
    def __init__(self, text: str):
        self.text = re.sub(r"//[^\n]*", lambda comment: " " * len(comment.group()), text)
        self.line_starts = [0, *(newline.end() for newline in re.finditer("\n", self.text))]
        self.at = 0
        self.scopes: list[dict[str, Register | str]] = []  # names local to a block
        self.blocks = 0
        self.free: dict[str, list[int]] = {file: [] for file in REGISTER_FILES}

    def error(self, what: str) -> PtxError:
        return PtxError(f"line {self.line()}: {what}: {self.text[self.at : self.at + 120]!r}")

    def line(self) -> int:
        return bisect.bisect_right(self.line_starts, self.at)

    def until(self, stop: str) -> str:
        end = self.text.find(stop, self.at)
        if end < 0:
            raise self.error(f"no {stop!r}")
        found, self.at = self.text[self.at : end], end + len(stop)
        return found

    def parse(self) -> Program:
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", self.text, re.DOTALL)
        if entry is None or len(re.findall(r"\.entry\b", self.text)) != 1 or ".func" in self.text:
            raise self.error("expected exactly one kernel and no function")
        self.program = Program(entry[1], [_parameter(part) for part in entry[2].split(",") if part.strip()])
        directives = dict(re.findall(r"\.(reqntid|maxnreg)\s+(\d+)", entry[3]))
        if "reqntid" not in directives:
            raise self.error("expected .reqntid")
        self.program.threads = int(directives["reqntid"])
        self.program.max_registers = int(directives.get("maxnreg", 0))
        self.at = entry.end()
        self.scopes = [{}]
        while self.scopes:
            self.statement()
        targets = {name for names in self.program.branch_targets.values() for name in names}
        if missing := sorted(targets - self.program.labels.keys()):
            raise self.error(f"no label {missing}")
        return self.program

    def statement(self) -> None:
        """One statement, from `at` on."""
        found = _STATEMENT.match(self.text, self.at)
        self.at, kind = found.end(), found.lastgroup
        if kind == "begin":
            self.scopes.append({})
            self.blocks += 1
        elif kind == "end":
            self.leave_block()
        elif kind == "targets":
            self.program.branch_targets[found["targets"]] = [name.strip() for name in self.until(";").split(",")]
        elif kind == "label":
            self.program.labels[self.label(found["label"], create=True)] = len(self.program.code)
        elif kind == "registers":
            self.declare(found["registers"], self.until(";"))
        elif kind == "nothing":
            pass
        elif self.at == len(self.text):
            raise self.error("the kernel does not end")
        elif self.text[self.at] == ".":
            raise self.error("unknown directive")
        else:
            line = self.line()
            self.instruction(" ".join(self.until(";").split()), line)

    def leave_block(self) -> None:
        for local in self.scopes.pop().values():
            if isinstance(local, Register):
                self.free[local.file].append(local.row)

    def declare(self, kind: str, names: str) -> None:
        """.reg .kind names: one by one, or `%r<12>` for twelve."""
        file = re.sub(r"^[usf]", "b", kind)
        if file not in REGISTER_FILES:
            raise self.error(f"unknown register type .{kind}")
        for name in names.split(","):
            many = re.fullmatch(r"\s*(%\w+)<(\d+)>\s*", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                if self.free[file]:
                    row = self.free[file].pop()
                else:
                    row = self.program.rows[file]
                    self.program.rows[file] += 1
                self.scopes[-1][one] = Register(file, row, one)

    def label(self, name: str, create: bool = False) -> str:
        """The name of a label in the whole program: one of an inline block belongs to it alone."""
        if len(self.scopes) > 1 and (create or name in self.scopes[-1]):
            return self.scopes[-1].setdefault(name, f"{name}@{self.blocks}")
        return name

    def instruction(self, text: str, line: int) -> None:
        guard, negated, body = None, False, text
        if found := _GUARD.match(text):
            guard, negated, body = self.operand(found[2]), bool(found[1]), text[found.end() :]
        opcode, _, rest = body.partition(" ")
        operands = [self.operand(part) for part in split(rest)]
        self.program.code.append(Instruction(len(self.program.code), opcode, operands, guard, negated, line, text))

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in split(text[1:-1])))
        if text.startswith("["):
            return self.address(split(text[1:-1]))
        if "|" in text:
            return Vector(tuple(self.operand(part) for part in text.split("|")))
        if text == "_":
            return None
        for scope in reversed(self.scopes):
            if text in scope:
                named = scope[text]
                return named if isinstance(named, Register) else Symbol(named)
        if re.match(r"-?\d", text):
            return Immediate(pattern_of(text))
        return Symbol(text)

    def address(self, parts: list[str]) -> Address:
        """[base + offset] or, of a tensor map, [base, {coordinates}]."""
        base, offset = parts[0].strip(), 0
        if found := _OFFSET.fullmatch(base):
            base, offset = found[1], pattern_of(found[2])
        coordinates = self.operand(parts[1]).items if len(parts) > 1 else ()
        return Address(self.operand(base), offset, coordinates)


def _parameter(text: str) -> tuple[str, int]:
    """`.param .u64 .ptr .global .align 1 name` or `.param .align 64 .b8 name[128]` -> (name, bytes)."""
    if array := re.search(r"\.b8\s+([\w$]+)\[(\d+)\]", text):
        return array[1], int(array[2])
    return text.split()[-1], int(re.search(r"\.[bfus](\d+)\b", text)[1]) // 8
