"""Threads that run together, what they do wrong, and the units of a processor that do things for them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from machine.processor import Wave
    from machine.program import Instruction

LANES = 32
NOBODY, SEVERAL, BEFORE_LAUNCH = -1, -2, -3  # in place of the number of a thread

Array = NDArray


class Fault(Exception):
    """What stops a launch: after it, nothing that the threads do would mean anything."""


@dataclass
class Finding:
    """Something a kernel must not do. The launch goes on."""

    rule: str
    instruction: str
    count: int
    where: str  # the first time

    def __str__(self) -> str:
        return f"{self.rule}, {self.count} times, first {self.where}; {self.instruction}"


class Findings:
    """One Finding for each rule and instruction."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Finding] = {}

    def add(self, rule: str, instruction: object, count: int, where: str) -> None:
        finding = self.found.setdefault((rule, str(instruction)), Finding(rule, str(instruction), 0, where))
        finding.count += count

    def __iter__(self):
        return iter(self.found.values())


class Cohort:
    """Threads of a wave at the same place of the program.

    threads: their numbers in the wave, ascending; columns: the same as what indexes a row of registers, a slice where
    possible; warps: numbers of their warps if all lanes of each are here, else None.
    """

    __slots__ = ("columns", "count", "threads", "warps")

    def __init__(self, threads: Array, total: int):
        self.threads, self.count = threads, len(threads)
        self.columns: slice | Array = threads
        if self.count == total:
            self.columns = slice(None)
        elif threads[-1] - threads[0] == self.count - 1:
            self.columns = slice(int(threads[0]), int(threads[-1]) + 1)
        self.warps = None
        if self.count % LANES == 0:
            rows = threads.reshape(-1, LANES)
            if (rows[:, 0] % LANES == 0).all() and (rows[:, -1] - rows[:, 0] == LANES - 1).all():
                self.warps = rows[:, 0] // LANES


class Observer(Protocol):
    """Who wants to know of each access to memory, before it is made."""

    def global_access(self, instruction: "Instruction", threads: Array, address: Array, size: int) -> None:
        """threads, address [n]: of accesses of `size` bytes within a tensor."""

    def shared_access(self, instruction: "Instruction", threads: Array, at: Array, size: int) -> None:
        """at [n]: indices into the shared memory of the wave, whose CTAs start at multiples of all banks."""


class Unit:
    """A part of a processor.

    OPCODES: opcode without its last modifiers -> method (instruction, cohort).
    MEETINGS: the same for what ends a segment -> method (instruction, cohort, following segment), which returns the
    segment to go on with, or None if the scheduler decides.
    """

    OPCODES: ClassVar[dict[str, str]] = {}
    MEETINGS: ClassVar[dict[str, str]] = {}

    def __init__(self, wave: "Wave"):
        self.wave = wave


def whole_warps(instruction: object, cohort: Cohort) -> Array:
    """The warps of a cohort, for an instruction that all lanes execute together."""
    if cohort.warps is None:
        raise Fault(f"not all lanes of a warp are here: {instruction}")
    return cohort.warps
