"""SASS as data: instructions, branches and loops of one compiled kernel, read from the text `nvdisasm -c` prints."""

import re
from dataclasses import dataclass, field
from functools import cached_property

LABEL = re.compile(r"^\s*(\.L_\w+):")
LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P\w+\s+)?(?P<text>\S.*?)\s*;")
TARGET = re.compile(r"\(\s*(\.L_\w+)\s*\)")
FIRST_OPERANDS = re.compile(r"^(?:!?U?P\w+,\s*)*R(\d+)\b")

TENSOR_CORE = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")
LOGIC = ("LOP3", "PLOP3", "SHF", "PRMT")  # the pipe that decodes packed integers
# Instructions whose first register operand is read, not written.
NO_DESTINATION = (
    "ST", "RED", "BAR", "WARPSYNC", "ISETP", "FSETP", "HSETP2", "DSETP", "PLOP3", "FCHK", "R2P", "R2UR", "BRA", "BRX",
    "CALL", "RET", "NANOSLEEP", "SYNCS", "UTMA", "LDGSTS", "CCTL",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    text: str  # without its predicate
    predicate: str = ""

    @cached_property
    def op(self) -> str:
        return self.text.split()[0]

    @cached_property
    def operands(self) -> str:
        return self.text[len(self.op) :].strip()

    @cached_property
    def width(self) -> int:
        """Bytes a lane moves in a memory instruction."""
        for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if suffix in self.op:
                return size
        return 4

    @cached_property
    def written(self) -> range:
        """Vector registers this instruction writes. A wgmma counts as writing none: its accumulators are the tensor
        core's until the group is waited for."""
        found = FIRST_OPERANDS.match(self.operands)
        if not found or self.op.startswith((*NO_DESTINATION, "HGMMA", "IGMMA", "QGMMA")):
            return range(0)
        if self.op.startswith(("HMMA", "IMMA")):
            count = 2 if self.op.endswith(".F16") else 4
        elif self.op.startswith("LDSM"):
            count = 4 if self.op.endswith(".4") else 2 if self.op.endswith(".2") else 1
        elif self.op.startswith("CS2R"):
            count = 1 if self.op.endswith(".32") else 2
        elif ".128" in self.op:
            count = 4
        else:
            count = 2 if ".64" in self.op or ".WIDE" in self.op else 1
        first = int(found.group(1))
        return range(first, first + count)

    @cached_property
    def named(self) -> frozenset[int]:
        """Vector registers the text names (of a multi-register operand: the first)."""
        return frozenset(int(number) for number in re.findall(r"(?<![\w.])R(\d+)", self.operands))


@dataclass
class Program:
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction after it

    def target(self, index: int) -> int | None:
        """Where the branch at `index` goes, or None for anything that is not a branch to a label."""
        instruction = self.code[index]
        found = TARGET.search(instruction.operands)
        if found and instruction.op.startswith(("BRA", "BSSY", "WARPSYNC", "CALL")):
            return self.labels.get(found.group(1))
        return None

    def successors(self, index: int) -> list[int]:
        """Every instruction that may run next. BSSY only names where its region joins again."""
        instruction, after = self.code[index], [index + 1] if index + 1 < len(self.code) else []
        if instruction.op.startswith(("EXIT", "BRX", "RET", "KILL")):
            return after if instruction.predicate else []
        if instruction.op.startswith("BSSY") or (target := self.target(index)) is None:
            return after
        # `BRA P1, label` carries a second condition among its operands
        conditional = instruction.predicate or "," in instruction.operands or not instruction.op.startswith("BRA")
        return [*after, target] if conditional else [target]

    def loops(self) -> list[range]:
        """Indices between a label and a branch back to it."""
        branches = ((self.target(index), index) for index in range(len(self.code)) if self.code[index].op == "BRA")
        return [range(start, index + 1) for start, index in branches if start is not None and start <= index]

    def hot_loop(self) -> list[Instruction]:
        """The innermost loop around tensor-core instructions, of several the one with most; without any, the longest
        loop. The shortest of equals: code that spins at a barrier is moved to the end of a kernel, and its branch back
        looks like one more loop around all that lies between."""
        bodies = {loop: self.code[loop.start : loop.stop] for loop in self.loops()}
        busy = [loop for loop in bodies if tensor_core(bodies[loop])]
        inner = [bodies[loop] for loop in busy if not any(inside(other, loop) for other in busy)]
        if inner:
            return max(inner, key=lambda body: (tensor_core(body), -len(body)))
        return max(bodies.values(), key=len, default=[])


def inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def parse(text: str) -> Program:
    program = Program()
    for line in text.splitlines():
        if label := LABEL.match(line):
            program.labels[label.group(1)] = len(program.code)
        elif found := LINE.match(line):
            program.code.append(Instruction(found["text"], (found["predicate"] or "").strip()))
    return program


def count(code: list[Instruction], *names: str) -> int:
    return sum(instruction.op.startswith(names) for instruction in code)


def moved(code: list[Instruction], *names: str) -> int:
    """Bytes a lane moves in the instructions of these names."""
    return sum(instruction.width for instruction in code if instruction.op.startswith(names))


def tensor_core(code: list[Instruction]) -> int:
    return count(code, *TENSOR_CORE)
