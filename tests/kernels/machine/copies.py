"""What copies into shared memory while threads go on: cp.async and TMA (PTX ISA 9.7.9.25), both as late as allowed.

What a cp.async copies arrives when its group is waited for, a box of TMA when nothing else can run, or at random.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from machine.barriers import MBarrier
from machine.program import Instruction, PtxError
from machine.races import Knowledge
from machine.threads import LANES, Array, Cohort, Fault, Unit

PIECE = 16  # bytes that a swizzle moves together


@dataclass
class Copy:
    """cp.async of some threads. threads [n], at [n]: of the wave, in shared memory; data uint8 [n, size];
    group [n]: how many groups its thread had committed before."""

    instruction: Instruction
    threads: Array
    at: Array
    data: Array
    group: Array

    def part(self, which: Array) -> "Copy":
        if which.all():
            return self
        return Copy(self.instruction, self.threads[which], self.at[which], self.data[which], self.group[which])


class CopyUnit(Unit):
    OPCODES: ClassVar = {
        "cp.async.ca.shared.global": "start", "cp.async.cg.shared.global": "start",
        "cp.async.commit_group": "commit", "cp.async.wait_group": "wait", "cp.async.wait_all": "wait",
    }  # fmt: skip

    def __init__(self, wave):
        super().__init__(wave)
        self.committed = np.zeros(wave.total, np.int32)  # groups, by thread
        self.pending: list[Copy] = []

    def start(self, instruction: Instruction, cohort: Cohort) -> None:
        """[to], [from], size and, perhaps, how many bytes of it are read: 0 fills with zeros."""
        wave, shared, operands = self.wave, self.wave.shared, instruction.operands
        if any(not part.startswith("L2::") for part in instruction.parts[5:]):
            raise PtxError(f"unknown instruction, {instruction}")
        size = operands[2].pattern
        if size not in (4, 8, 16) or (instruction.parts[2] == "cg" and size != 16):
            raise Fault(f"a copy of {size} bytes: {instruction}")
        at = shared.locate(instruction, cohort.threads, shared.address(cohort, operands[0]), size)
        count = np.full(cohort.count, size)
        if len(operands) > 3:
            count = wave.value(cohort, operands[3]).astype(np.int64)
        if ((count != 0) & (count != size)).any():
            raise Fault(f"a copy of {count.max()} bytes of {size}, which this machine does not know: {instruction}")
        data = np.zeros((cohort.count, size), np.uint8)
        if (reads := count > 0).any():
            data[reads] = self.fetch(instruction, Cohort(cohort.threads[reads], wave.total), size)
        if wave.observer:
            wave.observer.shared_access(instruction, cohort.threads, at, size)
        if wave.races:
            granules = shared.granules(at, size)
            shared.history.start_write(instruction, cohort.threads + wave.first_thread, granules)
        self.pending.append(Copy(instruction, cohort.threads, at, data, self.committed[cohort.threads]))

    def fetch(self, instruction: Instruction, cohort: Cohort, size: int) -> Array:
        address = self.wave.address(cohort, instruction.operands[1])
        at, inside = self.wave.global_.checked(instruction, cohort, address, size)
        self.wave.global_.check_read(instruction, cohort, at, inside, size)
        return self.wave.memory.data[at[:, None] + np.arange(size)]

    def commit(self, _: Instruction, cohort: Cohort) -> None:
        self.committed[cohort.threads] += 1

    def wait(self, instruction: Instruction, cohort: Cohort) -> None:
        """For all groups of each thread but its newest ones; wait_all for copies without a group too."""
        waiting = np.zeros(self.wave.total, bool)
        waiting[cohort.threads] = True
        left = []
        for copy in self.pending:
            due = waiting[copy.threads]
            if instruction.has("cp.async.wait_group"):
                newest = instruction.operands[0].pattern
                due &= copy.group < self.committed[copy.threads] - newest
            if due.any():
                self.land(copy.part(due))
            if not due.all():
                left.append(copy.part(~due))
        self.pending = left

    def land(self, copy: Copy) -> None:
        wave, size = self.wave, copy.data.shape[1]
        wave.shared.data[copy.at[:, None] + np.arange(size)] = copy.data
        if wave.races:
            granules = wave.shared.granules(copy.at, size)
            wave.shared.history.land(copy.threads + wave.first_thread, granules, generic=True)

    def check_finished(self) -> None:
        """At the end of a wave."""
        for copy in self.pending:
            where = self.wave.thread_name(copy.threads[0])
            self.wave.findings.add("a copy is never waited for", copy.instruction, len(copy.threads), where)


@dataclass(frozen=True)
class TensorMap:
    """A matrix and the boxes that TMA takes from it, which lie in shared memory in the swizzled order of wgmma.

    element: bytes; shape, strides: of the matrix, in elements; block: rows and columns of a box; swizzle: bytes, at
    least as many as a row of the box has.
    """

    element: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    address: int
    block: tuple[int, int]
    swizzle: int

    @property
    def row_bytes(self) -> int:
        return self.block[1] * self.element

    @property
    def bytes(self) -> int:
        return self.block[0] * self.row_bytes

    def pieces(self, column: int, row: int) -> tuple[Array, Array, Array]:
        """Of the box at (column, row): offsets of its pieces [n] in row-major order, addresses of their elements
        [n, k], and which of those are in the matrix."""
        in_row, per_piece = self.row_bytes // PIECE, PIECE // self.element
        box_row, piece = np.divmod(np.arange(self.bytes // PIECE), in_row)
        columns = column + piece[:, None] * per_piece + np.arange(per_piece)
        rows = (row + box_row)[:, None]
        inside = (columns >= 0) & (columns < self.shape[1]) & (rows >= 0) & (rows < self.shape[0])
        address = self.address + (rows * self.strides[0] + columns * self.strides[1]) * self.element
        return box_row * self.row_bytes + piece * PIECE, address, inside


def swizzled(at: Array, swizzle: int) -> Array:
    """Shared-memory addresses as a swizzle of 32, 64 or 128 bytes permutes them (PTX ISA 5.5.4): bits 4 and up are
    exclusive-ored with as many bits from bit 7 on."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return at ^ ((at >> 7 & bits) << 4)


@dataclass
class Box:
    """A box on its way. at [n]: of its pieces, in shared memory; source, inside [n, k]: addresses of elements; thread:
    which started it, in the grid; clock: of its warp then."""

    instruction: Instruction
    tensor: TensorMap
    at: Array
    source: Array
    inside: Array
    barrier: MBarrier
    thread: int
    clock: int
    knowledge: Knowledge


class TmaUnit(Unit):
    OPCODES: ClassVar = {"cp.async.bulk.tensor.2d.shared::cta.global": "start",
                         "cp.async.bulk.tensor.2d.shared::cluster.global": "start"}  # fmt: skip
    KINDS: ClassVar = {"mbarrier::complete_tx::bytes"}

    def __init__(self, wave):
        super().__init__(wave)
        self.flying: list[Box] = []

    def start(self, instruction: Instruction, cohort: Cohort) -> None:
        """[to], [tensor map, {column, row}], [mbarrier], by each thread of the cohort."""
        if not set(instruction.parts[7:]) <= self.KINDS | {"tile"}:
            raise PtxError(f"unknown instruction, {instruction}")
        wave, operands = self.wave, instruction.operands
        to, signal = (wave.shared.address(cohort, operands[n]) for n in (0, 2))
        tensors = wave.value(cohort, operands[1].base, np.uint64)
        column, row = (wave.value(cohort, one).view(np.int32) for one in operands[1].coordinates)
        for n, thread in enumerate(cohort.threads):
            tensor = wave.launch.tensor_maps.get(int(tensors[n]))
            if tensor is None:
                raise Fault(f"no tensor map at {int(tensors[n]):#x}: {instruction}")
            offsets, source, inside = tensor.pieces(int(column[n]), int(row[n]))
            one = np.array([thread])
            base = int(wave.shared.locate(instruction, one, to[n : n + 1], tensor.bytes, align=128)[0])
            start = base // wave.shared.size * wave.shared.size  # of the CTA: the swizzle goes by the address
            at = start + swizzled(base - start + offsets, tensor.swizzle)
            barrier = wave.mbarriers.find(instruction, thread, signal[n], asynchronous=True)
            in_grid = int(thread) + wave.first_thread
            warp = np.array([in_grid // LANES])
            clock = int(wave.clocks.own[warp[0]])
            if wave.races:
                granules = wave.shared.granules(at, PIECE)
                wave.shared.history.start_write(instruction, np.full(len(at), in_grid), granules)
            knowledge = wave.clocks.release(warp)
            self.flying.append(Box(instruction, tensor, at, source, inside, barrier, in_grid, clock, knowledge))

    def land_some(self) -> None:
        """Any box in flight of each CTA arrives. CTAs that are in step stay so, which is faster; boxes of one CTA tell
        another nothing."""
        which, of_cta = self.wave.random.random(), {}
        for box in self.flying:
            of_cta.setdefault(box.thread // self.wave.threads_per_cta, []).append(box)
        for boxes in of_cta.values():
            self.land(boxes.pop(int(which * len(boxes))))
        self.flying = [box for boxes in of_cta.values() for box in boxes]

    def land(self, box: Box) -> None:
        """It arrives and tells its mbarrier."""
        wave = self.wave
        wave.shared.data[box.at[:, None] + np.arange(PIECE)] = self.fetch(box)
        if wave.races:
            threads, clock = np.full(len(box.at), box.thread), np.full(len(box.at), box.clock)
            granules = wave.shared.granules(box.at, PIECE)
            wave.shared.history.land(threads, granules, generic=False, clock=clock)
        box.barrier.complete(box.tensor.bytes, box.knowledge)
        wave.mbarriers.settle(box.barrier)

    def fetch(self, box: Box) -> Array:
        """uint8 [n, 16]; zeros outside of the matrix."""
        size, memory = box.tensor.element, self.wave.memory
        data = np.zeros((*box.inside.shape, size), np.uint8)
        source = box.source[box.inside]
        at, inside = memory.locate(source.astype(np.uint64), size)
        if not inside.all():
            where = memory.describe(int(source[np.flatnonzero(~inside)[0]]))
            self.wave.findings.add("global memory: TMA out of bounds", box.instruction, int((~inside).sum()), where)
        unwritten = ~memory.written[at[:, None] + np.arange(size)].all(1) & inside
        if unwritten.any():
            where = memory.describe(int(source[np.flatnonzero(unwritten)[0]]))
            rule = "global memory: TMA reads what nobody has written"
            self.wave.findings.add(rule, box.instruction, int(unwritten.sum()), where)
        data[box.inside] = memory.data[at[:, None] + np.arange(size)]
        return data.reshape(len(box.at), PIECE)
