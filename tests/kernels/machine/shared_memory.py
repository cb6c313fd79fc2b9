"""Shared memory of the CTAs of a wave, with what loads and stores do to it (PTX ISA 9.7.9).

An address out of bounds or misaligned is a Fault: what follows would mean nothing. Uninitialised bytes are 0xAB.
"""

from typing import ClassVar

import numpy as np

from machine.emit import SHARED_BASE
from machine.global_memory import UNSIGNED, data_registers, element, extended
from machine.program import Address, Instruction, PtxError
from machine.races import SharedHistory
from machine.threads import Array, Cohort, Fault, Unit

UNINITIALISED = 0xAB
PAGE = 1024  # CTAs start at multiples of it, where the swizzles of wgmma and TMA repeat


def shared_granule(code: list[Instruction]) -> int:
    """Bytes that races are told apart by: 4, or as few as a load or store moves."""
    accesses = (i for i in code if i.of(SharedUnit.OPCODES))
    return min([4, *(element(i)[0] for i in accesses)])


class SharedUnit(Unit):
    OPCODES: ClassVar = {
        "ld.shared": "load", "ld.shared::cta": "load", "st.shared": "store", "st.shared::cta": "store",
    }  # fmt: skip

    def __init__(self, wave):
        super().__init__(wave)
        self.size = max(-(-wave.launch.shared_size // PAGE) * PAGE, PAGE)  # of a CTA
        self.granule = wave.launch.shared_granule
        self.data = np.full(wave.ctas * self.size, UNINITIALISED, np.uint8)
        self.views = {size: self.data.view(dtype) for size, dtype in UNSIGNED.items()}
        first_warps = (wave.first_thread // wave.threads_per_cta + np.arange(wave.ctas)) * wave.warps_per_cta
        self.history = SharedHistory(
            wave.clocks, self.report, wave.ctas, self.size // self.granule, first_warps, wave.warps_per_cta
        )

    def report(self, rule: str, instruction: object, count: int, thread: int, granule: int, other: int) -> None:
        wave = self.wave
        byte = granule * self.granule % self.size
        name = wave.launch.thread_name
        where = f"{name(thread)} at byte {byte}, other {name(other)}"
        wave.findings.add(f"shared memory: {rule}", instruction, count, where)

    def address(self, cohort: Cohort, address: Address) -> Array:
        return self.wave.value(cohort, address.base) + np.uint32(address.offset & 0xFFFFFFFF)

    def locate(self, instruction: Instruction, threads: Array, address: Array, size: int, align: int = 0) -> Array:
        """Indices into `data` of accesses of `size` bytes by threads of the wave."""
        offset = address.astype(np.int64) - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.size)
        if outside.any():
            n = int(np.flatnonzero(outside)[0])
            name = self.wave.thread_name(threads[n])
            raise Fault(f"shared memory: out of bounds at byte {offset[n]}, {name}: {instruction}")
        if (offset % (align or size)).any():
            raise Fault(f"shared memory: misaligned: {instruction}")
        return offset + threads // self.wave.threads_per_cta * self.size

    def granules(self, at: Array, size: int) -> Array:
        return at[:, None] // self.granule + np.arange(max(1, size // self.granule))

    def load(self, instruction: Instruction, cohort: Cohort) -> None:
        size, count = self.element(instruction)
        address = self.address(cohort, instruction.operands[1])
        at = self.locate(instruction, cohort.threads, address, size * count)
        self.check_read(instruction, cohort.threads, at, size * count)
        for n, register in enumerate(data_registers(instruction, count)):
            self.wave.set(cohort, register, extended(self.views[size][at // size + n], instruction))

    def store(self, instruction: Instruction, cohort: Cohort) -> None:
        size, count = self.element(instruction)
        address = self.address(cohort, instruction.operands[0])
        at = self.locate(instruction, cohort.threads, address, size * count)
        registers = data_registers(instruction, count)
        values = np.stack([self.wave.value(cohort, register, UNSIGNED[size]) for register in registers], 1)
        self.write(instruction, cohort.threads, at, values)

    @staticmethod
    def element(instruction: Instruction) -> tuple[int, int]:
        if set(instruction.parts[2:-1]) - {"v2", "v4", "v8"}:
            raise PtxError(f"unknown instruction, {instruction}")
        return element(instruction)

    def check_read(self, instruction: Instruction, threads: Array, at: Array, size: int) -> None:
        if self.wave.observer:
            self.wave.observer.shared_access(instruction, threads, at, size)
        if self.wave.races:
            threads, granules = threads + self.wave.first_thread, self.granules(at, size)
            self.history.check_read(instruction, threads, granules)
            self.history.note_read(threads, granules)

    def write(self, instruction: Instruction, threads: Array, at: Array, values: Array) -> None:
        """values [n, k]: k consecutive elements of any width for each of n threads."""
        size = values.dtype.itemsize
        if self.wave.observer:
            self.wave.observer.shared_access(instruction, threads, at, size * values.shape[1])
        data, where = self.views[size], (at // size)[:, None] + np.arange(values.shape[1])
        changes = (data[where] != values).any(1)
        data[where] = values
        if not self.wave.races:
            return
        threads, granules = threads + self.wave.first_thread, self.granules(at, size * values.shape[1])
        self.history.check_write(instruction, threads, granules, changes)
        self.history.note_write(threads, granules)
        lost = data[where] != values
        if lost.any():  # threads that write the same to a place do no harm
            n, _ = np.argwhere(lost)[0]
            other = int(self.history.writer[granules[n, 0]])
            self.report(
                "is written by two threads at once", instruction, int(lost.sum()), int(threads[n]),
                int(granules[n, 0]), other,
            )  # fmt: skip
