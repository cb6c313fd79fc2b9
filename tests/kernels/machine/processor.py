"""A launch: all CTAs of a grid, a wave of them at a time, with who runs next drawn at random.

Threads of a wave are columns of arrays. Those that stand at the same place run together (a cohort), until they meet
others or could. Which cohort goes on is drawn anew wherever an order of threads could matter.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from machine.barriers import (
    AT_BARRIER,
    DONE,
    RUNNING,
    STATES,
    BarrierUnit,
    MBarrierUnit,
    RegisterUnit,
)
from machine.copies import CopyUnit, TensorMap, TmaUnit
from machine.emit import Compiled, compile_program, symbol_address
from machine.global_memory import GlobalMemory, GlobalUnit, global_granule, new_history
from machine.program import REGISTER_FILES, Address, Immediate, Instruction, Operand, Program, Register
from machine.races import Clocks, Knowledge
from machine.shared_memory import SharedUnit, shared_granule
from machine.threads import LANES, NOBODY, SEVERAL, Array, Cohort, Fault, Findings, Observer, Unit
from machine.warp import WarpUnit
from machine.wgmma import WgmmaUnit

UNITS: dict[str, type[Unit]] = {
    "global_": GlobalUnit, "shared": SharedUnit, "copies": CopyUnit, "mbarriers": MBarrierUnit, "tma": TmaUnit,
    "barriers": BarrierUnit, "setmaxnreg": RegisterUnit, "warp": WarpUnit, "wgmma": WgmmaUnit,
}  # fmt: skip
# What registers hold at the start: NaN, and no small number
UNINITIALISED = {"pred": False, "b16": 0x7FD1, "b32": 0x7FD1DEAD, "b64": 0x7FF4DEADBEEF0001}
DTYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
PARAMETER_TYPES = {"s": "int", "u": "uint", "b": "uint", "f": "float"}
MOST_THREADS = 8192  # of a wave
NOT_READY = 1 << 30  # a place in no program


def compiled(program: Program) -> Compiled:
    """Raises PtxError for an instruction that no unit knows."""
    return compile_program(program, UNITS)


@dataclass(frozen=True)
class Settings:
    """How a launch runs. seed: of the order of threads; races: look for them; observer: of accesses to memory."""

    seed: int = 0
    races: bool = True
    observer: Observer | None = None


class Launch:
    """One launch of a compiled kernel. Its Findings are all it says; results are in `memory`.

    parameters: bytes as the kernel's parameter space has them; tensor_maps: by the address of their parameter.
    """

    def __init__(
        self, code: Compiled, grid: tuple[int, int, int], parameters: bytes, memory: GlobalMemory, shared_size: int,
        tensor_maps: dict[int, TensorMap] | None = None, settings: Settings = Settings(),
    ):  # fmt: skip
        self.compiled, self.program, self.grid = code, code.program, grid
        self.parameters, self.memory, self.shared_size = parameters, memory, shared_size
        self.tensor_maps = tensor_maps or {}
        self.races, self.observer = settings.races, settings.observer
        self.random = np.random.default_rng(settings.seed)
        self.findings = Findings()
        self.executed: Counter[int] = Counter()  # segment -> threads
        self.wgmma_rows = code.wgmma_rows
        self.offsets, _ = self.program.parameter_offsets()
        self.shared_granule, self.global_granule = (of(self.program.code) for of in (shared_granule, global_granule))
        count = int(np.prod(grid))
        indices = np.stack(np.unravel_index(np.arange(count), grid[::-1])[::-1], 1)  # x is the fastest
        self.ctas = indices[self.random.permutation(count)]
        self.clocks = Clocks(count * -(-self.program.threads // LANES))
        self.released: dict[int, Knowledge] = {}  # by atomics, by word
        self.global_history = new_history(self.clocks, memory, self.global_granule, self.report_global)

    def run(self) -> None:
        """Raises Fault, and PtxError for an instruction whose operands this machine does not know."""
        size = max(1, MOST_THREADS // self.program.threads)
        for start in range(0, len(self.ctas), size):
            wave = Wave(self, start, self.ctas[start : start + size])
            with np.errstate(all="ignore"):
                wave.run()

    def thread_name(self, thread: int) -> str:
        """thread: counted through the grid in the order in which CTAs were launched."""
        if thread < 0:
            return {NOBODY: "nobody", SEVERAL: "several lanes"}.get(thread, "whoever was before")
        cta = tuple(map(int, self.ctas[thread // self.program.threads]))
        return f"CTA {cta} thread {thread % self.program.threads}"

    def report_global(self, rule: str, instruction: object, count: int, thread: int, granule: int, other: int) -> None:
        place = self.memory.describe_index(granule * self.global_granule)
        where = f"{self.thread_name(thread)} at {place}, other {self.thread_name(other)}"
        self.findings.add(f"global memory: {rule}", instruction, count, where)


class Wave:
    """CTAs that are on the machine at the same time. Columns of `registers` are threads."""

    def __init__(self, launch: Launch, start: int, ctas: Array):
        """start: how many CTAs were launched before."""
        self.launch, self.ctas = launch, len(ctas)
        self.memory, self.clocks, self.findings = launch.memory, launch.clocks, launch.findings
        self.random, self.races, self.observer = launch.random, launch.races, launch.observer
        self.threads_per_cta = launch.program.threads
        self.warps_per_cta = -(-self.threads_per_cta // LANES)
        self.total = self.ctas * self.threads_per_cta
        self.first_thread = start * self.threads_per_cta
        self.registers = {
            file: np.full((launch.program.rows[file], self.total), UNINITIALISED[file], DTYPES[file])
            for file in REGISTER_FILES
        }
        b16, b32, b64 = (self.registers[file] for file in ("b16", "b32", "b64"))
        self.views = (
            self.registers["pred"], b16, b16.view(np.int16), b32, b32.view(np.int32), b32.view(np.float32), b64,
            b64.view(np.int64), b64.view(np.float64),
        )  # fmt: skip
        self.special = self.special_registers(ctas)
        self.at = np.zeros(self.total, np.int32)  # segment that a thread runs next
        self.state = np.full(self.total, RUNNING, np.int8)
        for name, unit in UNITS.items():
            setattr(self, name, unit(self))
        # CTAs go side by side; to an atomic together, some at a time, or one by one
        self.mode = self.random.choice(["together", "some", "alone"], p=[0.5, 0.3, 0.2])

    def special_registers(self, ctas: Array) -> dict[str, Array]:
        thread = np.tile(np.arange(self.threads_per_cta, dtype=np.uint32), self.ctas)
        special = {"%tid.x": thread, "%laneid": thread % LANES, "%warpid": thread // LANES}
        for axis, name in enumerate("xyz"):
            special[f"%ctaid.{name}"] = np.repeat(ctas[:, axis].astype(np.uint32), self.threads_per_cta)
            special[f"%nctaid.{name}"] = np.full(self.total, self.launch.grid[axis], np.uint32)
        special["%tid.y"] = special["%tid.z"] = np.zeros(self.total, np.uint32)
        return special

    # operands --------------------------------------------------------------------------------------------------------

    def value(self, cohort: Cohort, operand: Operand, dtype: type = np.uint32) -> Array:
        """An operand for all threads of a cohort."""
        if isinstance(operand, Register):
            values = self.registers[operand.file][operand.row][cohort.columns]
            return values if values.dtype == dtype else values.astype(dtype)
        if isinstance(operand, Immediate):
            pattern = operand.pattern & (1 << 8 * np.dtype(dtype).itemsize) - 1
        else:
            pattern = symbol_address(self.launch.program, operand.name)
        return np.full(cohort.count, pattern, dtype)

    def set(self, cohort: Cohort, operand: Operand, value: Array) -> None:
        if operand is not None:
            self.registers[operand.file][operand.row][cohort.columns] = value

    def words(self, cohort: Cohort, registers: tuple[Register, ...]) -> Array:
        """32-bit registers as [register, thread of the cohort]."""
        return self.registers["b32"][self.block(cohort, registers)]

    def set_words(self, cohort: Cohort, registers: tuple[Register, ...], values: Array) -> None:
        self.registers["b32"][self.block(cohort, registers)] = values

    @staticmethod
    def block(cohort: Cohort, registers: tuple[Register, ...]) -> tuple:
        """Indices of rows and columns."""
        rows = np.array([register.row for register in registers])
        return (rows, cohort.columns) if isinstance(cohort.columns, slice) else (rows[:, None], cohort.columns)

    def address(self, cohort: Cohort, address: Address) -> Array:
        """Of global memory."""
        return self.value(cohort, address.base, np.uint64) + np.uint64(address.offset & 2**64 - 1)

    def parameter(self, name: str, offset: int, kind: str) -> np.generic:
        start, size = self.launch.offsets[name] + offset, int(kind[1:]) // 8
        return np.frombuffer(self.launch.parameters[start : start + size], f"{PARAMETER_TYPES[kind[0]]}{8 * size}")[0]

    # names -----------------------------------------------------------------------------------------------------------

    def warps_in_grid(self, warps: Array) -> Array:
        return warps + self.first_thread // LANES

    def thread_name(self, thread: int) -> str:
        return self.launch.thread_name(int(thread) + self.first_thread)

    def segment_of(self, instruction: Instruction) -> int:
        """The segment that starts with an instruction."""
        return self.launch.compiled.starts.index(instruction.number)

    # who runs --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until all threads are done. Raises Fault for a deadlock."""
        segments, apart, executed = self.launch.compiled.segments, self.launch.compiled.apart, self.launch.executed
        while not (self.state == DONE).all():
            if self.tma.flying and self.random.random() < 0.3:
                self.tma.land_some()
            if not (self.state == RUNNING).any():
                if not self.tma.flying:
                    raise Fault(f"deadlock: {self.standing()}")
                self.tma.land_some()
                continue
            cohort, at = self.draw()
            while at is not None:
                executed[at] += cohort.count
                at = segments[at](self, cohort)
                if at in apart and self.mode != "together":
                    self.at[cohort.threads] = at
                    break
        self.copies.check_finished()

    def draw(self) -> tuple[Cohort, int]:
        """Threads that run next, and the segment they are at: lanes of a warp that lag behind go first. Of CTAs only
        atomics tell who was first, so all of a wave go together up to one: races are found in any order."""
        ready = self.state == RUNNING
        at = np.where(ready, self.at, NOT_READY).reshape(-1, LANES)
        lowest = at.min(1)
        warps = np.flatnonzero(lowest < NOT_READY)
        chosen = int(self.random.choice(warps))
        segment = int(lowest[chosen])
        members = warps[lowest[warps] == segment]
        if self.mode != "together" and segment in self.launch.compiled.apart:
            with_chosen = np.zeros(self.ctas, bool)
            if self.mode == "some":
                with_chosen = self.random.random(self.ctas) < 0.5
            with_chosen[chosen // self.warps_per_cta] = True
            members = members[with_chosen[members // self.warps_per_cta]]
        if len(members) > 1 and self.random.random() < 0.1:
            members = np.array([chosen])
        threads = (members[:, None] * LANES + np.arange(LANES))[at[members] == segment]
        return Cohort(threads, self.total), segment

    def standing(self) -> dict[str, int]:
        """Where threads that are not done stand: place -> how many warps."""
        places: Counter[str] = Counter()
        for thread in np.flatnonzero(self.state != DONE):
            if thread % LANES == 0:
                segment = self.at[thread] - (self.state[thread] == AT_BARRIER)
                instruction = self.launch.compiled.instructions(segment)[-1]
                places[f"{STATES[self.state[thread]]} at {instruction}"] += 1
        return dict(places)

    def guarded(self, cohort: Cohort, predicate: Array, negated: bool) -> Cohort | None:
        """The threads of a cohort for which a guard holds."""
        holds = predicate[cohort.columns] ^ negated
        if holds.all():
            return cohort
        threads = cohort.threads[holds]
        return Cohort(threads, self.total) if len(threads) else None

    def pause(self, cohort: Cohort, following: int) -> int | None:
        """Perhaps let others go first."""
        if self.random.random() < 0.7:
            return following
        self.at[cohort.threads] = following
        return None

    def branch(self, cohort: Cohort, predicate: Array, negated: bool, target: int, following: int) -> int | None:
        taken = predicate[cohort.columns] ^ negated
        if taken.all():
            return target
        if not taken.any():
            return following
        self.at[cohort.threads] = np.where(taken, target, following)
        return None

    def branch_by_table(self, instruction: Instruction, cohort: Cohort, targets: list[int]) -> None:
        index = self.value(cohort, instruction.operands[0]).astype(np.int64)
        if (index >= len(targets)).any():
            raise Fault(f"branch beyond its table: {instruction}")
        self.at[cohort.threads] = np.array(targets)[index]

    def leave(self, cohort: Cohort) -> None:
        self.state[cohort.threads] = DONE
        for cta in np.unique(cohort.threads // self.threads_per_cta):
            self.barriers.settle_cta(int(cta))
