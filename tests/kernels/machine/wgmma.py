"""wgmma: four warps multiply while they go on (PTX ISA 9.7.15), here as late as allowed.

Registers and shared memory are read, and sums written, when the group is waited for. Until then nobody may change what
it reads, or touch its sums; what a warp wrote into its registers must be fenced off first.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from machine import arithmetic, fragments
from machine.copies import swizzled
from machine.emit import SHARED_BASE
from machine.program import Instruction, PtxError, Vector
from machine.threads import LANES, Array, Cohort, Fault, Unit, whole_warps

READ, SUMMED = 1, 2  # how a running wgmma uses a register
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # of the last two bits of a descriptor
SHAPE = re.compile(r"m64n(\d+)k(\d+)")
INPUTS = {("bf16", 16), ("f16", 16), ("s8", 32)}


@dataclass
class Product:
    """A wgmma on its way. warps [w]; group [w]: groups that its warp had committed before; right [w, n, bytes] and, if
    A is in shared memory, left [w, 16, bytes]: where the operands lie; keep [w]: are the sums added to."""

    instruction: Instruction
    warps: Array
    group: Array
    right: Array
    left: Array | None
    keep: Array
    sums: list[int]  # rows of registers
    registers: list[int]  # rows of registers of A
    kind: str

    def part(self, which: Array) -> "Product":
        left = None if self.left is None else self.left[which]
        return replace(
            self, warps=self.warps[which], group=self.group[which], right=self.right[which], left=left,
            keep=self.keep[which],
        )  # fmt: skip

    @property
    def accumulates(self) -> str:
        return "s32" if self.kind == "s8" else "f32"


def operand_addresses(descriptor: Array, rows: Array, row_bytes: int) -> Array:
    """Shared addresses of the bytes of a K-major operand, [w, rows, row_bytes], by its matrix descriptor (PTX ISA
    9.7.15.5.1). descriptor uint64 [w]; rows [w or 1, rows]: which rows."""

    def field(low: int, bits: int) -> Array:
        return (descriptor >> np.uint64(low) & np.uint64((1 << bits) - 1)).astype(np.int64)[:, None, None]

    start, leading, stride = field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4
    if field(49, 3).any() or len(np.unique(field(62, 2))) > 1:
        raise PtxError(f"unknown matrix descriptor {descriptor[0]:#x}")
    swizzle = SWIZZLES[int(field(62, 2)[0, 0, 0])]
    n, k = rows[:, :, None], np.arange(row_bytes)[None, None, :]
    if swizzle:
        return swizzled(start + stride * (n // 8) + swizzle * (n % 8) + k, swizzle)
    return start + stride * (n // 8) + 16 * (n % 8) + leading * (k // 16) + k % 16  # core matrices of 8 rows


class WgmmaUnit(Unit):
    OPCODES: ClassVar = {
        "wgmma.fence.sync.aligned": "fence", "wgmma.mma_async.sync.aligned": "start",
        "wgmma.commit_group.sync.aligned": "commit", "wgmma.wait_group.sync.aligned": "wait",
    }  # fmt: skip

    def __init__(self, wave):
        super().__init__(wave)
        rows, warps = wave.launch.program.rows["b32"] if wave.launch.wgmma_rows else 0, wave.total // LANES
        self.used = np.zeros((rows, warps), np.int8)
        self.unfenced = np.ones((rows, warps), bool)  # touched since the last wgmma.fence, if there was one
        self.committed = np.zeros(warps, np.int32)
        self.running: list[Product] = []

    def touch(self, instruction: Instruction, cohort: Cohort, written: list[int], read: list[int]) -> None:
        """Threads write and read rows of registers that some wgmma takes operands from."""
        warps = np.unique(cohort.threads // LANES)
        where = self.wave.thread_name(cohort.threads[0])
        self.unfenced[np.array(written + read)[:, None], warps] = True
        for row in written:
            if self.used[row, warps].any():
                self.wave.findings.add("register of a running wgmma is written", instruction, cohort.count, where)
        for row in read:
            if (self.used[row, warps] == SUMMED).any():
                self.wave.findings.add("sum of a running wgmma is read", instruction, cohort.count, where)

    def fence(self, instruction: Instruction, cohort: Cohort) -> None:
        self.unfenced[:, whole_warps(instruction, cohort)] = False

    def commit(self, instruction: Instruction, cohort: Cohort) -> None:
        self.committed[whole_warps(instruction, cohort)] += 1

    def start(self, instruction: Instruction, cohort: Cohort) -> None:
        """D, A in registers or a descriptor, B a descriptor, is D added to, signs and orders of the inputs."""
        wave, warps = self.wave, whole_warps(instruction, cohort)
        found, kind = SHAPE.fullmatch(instruction.parts[4]), instruction.parts[-1]
        known = found and (kind, int(found[2])) in INPUTS and instruction.parts[5:-1] == [
            "s32" if kind == "s8" else "f32", kind
        ]  # fmt: skip
        to, a, b, keep, *flags = instruction.operands
        signs, orders = [flag.pattern for flag in flags[:2]], [flag.pattern for flag in flags[2:]]
        if not known or signs not in ([], [1, 1]) or any(orders):
            raise PtxError(f"unknown instruction, {instruction}")
        columns, row_bytes = int(found[1]), LANES  # 16 elements of 16 bits or 32 of 8
        sums = [register.row for register in to.items]
        registers = [register.row for register in a.items] if isinstance(a, Vector) else []
        stale = [row for row in sums + registers if self.unfenced[row, warps].any()]
        if stale:
            rule = "wgmma without a fence after its registers were touched"
            wave.findings.add(rule, instruction, cohort.count, f"{len(stale)} registers")
        self.mark(warps, registers, sums)
        right = self.located(instruction, warps, cohort, b, np.arange(columns)[None, :], row_bytes)
        left = None
        if not registers:
            rows = (warps % 4 * 16)[:, None] + np.arange(16)
            left = self.located(instruction, warps, cohort, a, rows, row_bytes)
        adds = wave.value(cohort, keep, np.bool_)[::LANES]
        product = Product(
            instruction, warps, self.committed[warps], right, left, adds, sums, registers, kind
        )  # fmt: skip
        if wave.races:
            for threads, granules in self.operand_granules(product):
                wave.shared.history.check_read(instruction, threads, granules, asynchronous=True)
                np.add.at(wave.shared.history.being_read, granules.ravel(), np.int16(1))
        self.running.append(product)

    def mark(self, warps: Array, registers: list[int], sums: list[int]) -> None:
        self.used[np.array(registers, int)[:, None], warps] = READ
        self.used[np.array(sums)[:, None], warps] = SUMMED

    def located(
        self, instruction: Instruction, warps: Array, cohort: Cohort, operand: object, rows: Array, row_bytes: int
    ) -> Array:
        """Indices into shared memory of an operand that a descriptor describes."""
        shared = self.wave.shared
        descriptor = self.wave.value(cohort, operand, np.uint64)[::LANES]
        at = operand_addresses(descriptor, rows, row_bytes) - SHARED_BASE
        if (at < 0).any() or (at >= shared.size).any():
            raise Fault(f"shared memory: a matrix descriptor reaches out of bounds: {instruction}")
        return at + (warps // self.wave.warps_per_cta * shared.size)[:, None, None]

    def operand_granules(self, product: Product):
        """Yield threads [w] and granules [w, n] that each warp reads."""
        shared = self.wave.shared
        threads = product.warps * LANES + self.wave.first_thread
        for at in (product.right, product.left):
            if at is not None:
                yield threads, at[:, :, :: shared.granule].reshape(len(threads), -1) // shared.granule

    def wait(self, instruction: Instruction, cohort: Cohort) -> None:
        """For all groups of a warp but its newest ones."""
        warps, newest = whole_warps(instruction, cohort), instruction.operands[0].pattern
        waiting = np.zeros(len(self.committed), bool)
        waiting[warps] = True
        left = []
        for product in self.running:
            due = waiting[product.warps] & (product.group < self.committed[product.warps] - newest)
            if due.any():
                self.finish(product.part(due))
            if not due.all():
                left.append(product.part(~due))
        self.running = left
        self.used[:, warps] = 0
        for product in left:
            self.mark(product.warps, product.registers, product.sums)

    def finish(self, product: Product) -> None:
        """Multiply, and write the sums."""
        registers = self.wave.registers["b32"]
        threads = (product.warps[:, None] * LANES + np.arange(LANES)).ravel()
        # warps of a CTA share B, which is looked up once
        _, first, which = np.unique(product.right[:, 0, 0], return_index=True, return_inverse=True)
        b = self.elements(product.right[first], product.kind).transpose(0, 2, 1)[which.ravel()]  # [w, k, n]
        if product.left is None:
            a = fragments.left_operand(registers[np.array(product.registers)[:, None], threads], product.kind)
        else:
            a = self.elements(product.left, product.kind)
        before = fragments.accumulators(registers[np.array(product.sums)[:, None], threads], product.accumulates)
        before = np.where(np.repeat(product.keep, LANES), before, 0)
        total = fragments.accumulator_registers(np.matmul(a, b)) + before
        registers[np.array(product.sums)[:, None], threads] = fragments.rounded(total, product.accumulates)
        if self.wave.races:
            history = self.wave.shared.history
            for readers, granules in self.operand_granules(product):
                np.add.at(history.being_read, granules.ravel(), np.int16(-1))
                history.note_read(readers, granules)

    def elements(self, at: Array, kind: str) -> Array:
        """Bytes of shared memory as float64."""
        data = self.wave.shared.data[at]
        if kind == "s8":
            return data.view(np.int8).astype(np.float64)
        table = arithmetic.F64_OF_BF16 if kind == "bf16" else arithmetic.F64_OF_F16
        return table.take(np.ascontiguousarray(data).view(np.uint16))
