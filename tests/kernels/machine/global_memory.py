"""Global memory: the tensors of a launch, each in an address range of its own, and what loads, stores and atomics do.

Tensors are a terabyte apart, so that no wrong offset leads from one into another. What nobody has written is known byte
by byte, and so is what lies between the rows of a slice and belongs to nobody.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from machine.program import Instruction, PtxError, Vector
from machine.races import AccessHistory
from machine.threads import BEFORE_LAUNCH, LANES, Array, Cohort, Unit

TENSOR_BITS = 40
ALIGNMENT = 256
GARBAGE = 0xCD  # what an access out of bounds reads
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass
class Tensor:
    """Bytes of a launch's argument. data uint8 [n]; valid, written bool [n]: is a byte part of the tensor, has anybody
    written it; skew: its address modulo 256."""

    name: str
    data: Array
    valid: Array
    written: Array
    skew: int = 0


class GlobalMemory:
    """The bytes of all tensors in one array, `start` being where each begins. Tensor 0 stands for no tensor."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.start, self.skew, self.length = (np.zeros(len(tensors) + 1, np.int64) for _ in range(3))
        end = 0
        for n, tensor in enumerate(tensors, 1):
            self.start[n], self.skew[n], self.length[n] = end + tensor.skew, tensor.skew, len(tensor.data)
            end += -(-(tensor.skew + len(tensor.data)) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.data = np.full(max(end, ALIGNMENT), GARBAGE, np.uint8)
        self.valid, self.written, self.touched = (np.zeros(len(self.data), bool) for _ in range(3))
        for n, tensor in enumerate(tensors, 1):
            piece = self.piece(n - 1)
            self.data[piece], self.valid[piece], self.written[piece] = tensor.data, tensor.valid, tensor.written

    def piece(self, n: int) -> slice:
        """Where the bytes of tensor n (from 0) lie."""
        return slice(int(self.start[n + 1]), int(self.start[n + 1] + self.length[n + 1]))

    def address(self, n: int) -> int:
        """Of the first byte of tensor n (from 0)."""
        return (n + 1 << TENSOR_BITS) + int(self.skew[n + 1])

    def locate(self, address: Array, size: int) -> tuple[Array, Array]:
        """Indices of the first bytes, 0 for what is outside, and whether `size` bytes lie within one tensor."""
        which = (address >> np.uint64(TENSOR_BITS)).astype(np.int64)
        inside = (which >= 1) & (which < len(self.start))
        which = np.where(inside, which, 0)
        offset = (address & np.uint64((1 << TENSOR_BITS) - 1)).astype(np.int64) - self.skew[which]
        inside &= (offset >= 0) & (offset + size <= self.length[which])
        at = np.where(inside, self.start[which] + offset, 0)
        inside &= self.valid[at] & self.valid[np.where(inside, at + size - 1, 0)]
        return np.where(inside, at, 0), inside

    def describe(self, address: int) -> str:
        which, offset = address >> TENSOR_BITS, address & (1 << TENSOR_BITS) - 1
        if 1 <= which < len(self.start):
            length = self.length[which]
            return f"byte {offset - int(self.skew[which])} of {self.tensors[which - 1].name} ({length} bytes)"
        return f"address {address:#x}, in no tensor"

    def describe_index(self, at: int) -> str:
        n = max(int(np.searchsorted(self.start[1:], at, side="right")), 1)
        return f"byte {at - int(self.start[n])} of {self.tensors[n - 1].name}"


def element(instruction: Instruction) -> tuple[int, int]:
    """Bytes of an element of a load or store, and how many it moves: `.v4.b32` is (4, 4)."""
    count = next((int(part[1]) for part in instruction.parts if part in ("v2", "v4", "v8")), 1)
    return int(instruction.parts[-1][1:]) // 8, count


def data_registers(instruction: Instruction, count: int) -> tuple:
    """The registers that a load fills or a store takes."""
    data = instruction.operands[0] if instruction.parts[0] == "ld" else instruction.operands[1]
    items = data.items if isinstance(data, Vector) else (data,)
    if len(items) != count:
        raise PtxError(f"expected {count} registers, {instruction}")
    return items


def extended(values: Array, instruction: Instruction) -> Array:
    """An element as a register wider than it holds it: signed types keep their sign."""
    if instruction.parts[-1][0] == "s":
        return values.view(SIGNED[values.dtype.itemsize]).astype(np.int64).view(np.uint64)
    return values


def global_granule(code: list[Instruction]) -> int:
    """Bytes that races are told apart by: 4, or as few as a store writes."""
    return min([4, *(element(i)[0] for i in code if i.has("st.global"))])


class GlobalUnit(Unit):
    """ld.global, st.global, atom.global (PTX ISA 9.7.9)."""

    OPCODES: ClassVar = {"ld.global": "load", "st.global": "store", "atom.global": "atomic"}
    MODIFIERS: ClassVar = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "v2", "v4", "v8", "relaxed", "gpu", "cta"}

    def load(self, instruction: Instruction, cohort: Cohort) -> None:
        size, count = self.element(instruction)
        address = self.wave.address(cohort, instruction.operands[1])
        at, inside = self.checked(instruction, cohort, address, size * count)
        self.check_read(instruction, cohort, at, inside, size * count)
        data = self.wave.memory.data.view(UNSIGNED[size])
        for n, register in enumerate(data_registers(instruction, count)):
            values = data[at // size + n]
            if not inside.all():
                values = np.where(inside, values, np.frombuffer(bytes([GARBAGE] * size), values.dtype))
            self.wave.set(cohort, register, extended(values, instruction))

    def store(self, instruction: Instruction, cohort: Cohort) -> None:
        size, count = self.element(instruction)
        address = self.wave.address(cohort, instruction.operands[0])
        at, inside = self.checked(instruction, cohort, address, size * count)
        at, threads = at[inside], cohort.threads[inside] + self.wave.first_thread
        if not len(threads):
            return
        wave, memory = self.wave, self.wave.memory
        if wave.races:
            granules = self.granules(at, size * count)
            history = wave.launch.global_history
            history.check_write(instruction, threads, granules)
            history.note_write(threads, granules)
            history.check_one_writer(instruction, threads, granules)
        data = memory.data.view(UNSIGNED[size])
        for n, register in enumerate(data_registers(instruction, count)):
            data[at // size + n] = wave.value(cohort, register, UNSIGNED[size])[inside]
        reach = at[:, None] + np.arange(size * count)
        memory.written[reach] = True
        memory.touched[reach] = True

    def atomic(self, instruction: Instruction, cohort: Cohort) -> None:
        """atom.global.add of 32-bit integers, lane after lane in a random order."""
        parts, wave, memory = instruction.parts, self.wave, self.wave.memory
        orders = [part for part in parts if part in ("relaxed", "acquire", "release", "acq_rel")]
        if parts[-2] != "add" or parts[-1] not in ("u32", "s32") or set(parts[2:-2]) - {"gpu", *orders}:
            raise PtxError(f"unknown instruction, {instruction}")
        order = orders[0] if orders else "relaxed"
        at, inside = self.checked(instruction, cohort, wave.address(cohort, instruction.operands[1]), 4)
        summand = wave.value(cohort, instruction.operands[2])
        data, old = memory.data.view(np.uint32), np.zeros(cohort.count, np.uint32)
        released = wave.launch.released
        for n in wave.random.permutation(np.flatnonzero(inside)):
            word = int(at[n]) // 4
            old[n] = data[word]
            data[word] += summand[n]
            warp = np.array([(int(cohort.threads[n]) + wave.first_thread) // LANES])
            if order in ("acq_rel", "acquire") and word in released:
                wave.clocks.acquire(warp, released[word])
            if order in ("acq_rel", "release"):
                released[word] = wave.clocks.release(warp)
        memory.touched[at[inside][:, None] + np.arange(4)] = True
        wave.set(cohort, instruction.operands[0], old)

    def element(self, instruction: Instruction) -> tuple[int, int]:
        unknown = [p for p in instruction.parts[2:-1] if p not in self.MODIFIERS and not p.startswith("L")]
        if unknown:
            raise PtxError(f"unknown instruction, {instruction}")
        return element(instruction)

    def granules(self, at: Array, size: int) -> Array:
        granule = self.wave.launch.global_granule
        return at[:, None] // granule + np.arange(max(1, size // granule))

    def checked(self, instruction: Instruction, cohort: Cohort, address: Array, size: int) -> tuple[Array, Array]:
        """Like GlobalMemory.locate; accesses out of bounds and misaligned ones are findings."""
        wave = self.wave
        at, inside = wave.memory.locate(address, size)
        misaligned = address & np.uint64(size - 1) != 0
        for rule, bad in (("out of bounds", ~inside), ("misaligned", misaligned)):
            if bad.any():
                n = int(np.flatnonzero(bad)[0])
                where = f"{wave.thread_name(cohort.threads[n])}: {wave.memory.describe(int(address[n]))}"
                wave.findings.add(f"global memory: {rule}", instruction, int(bad.sum()), where)
        good = inside & ~misaligned
        if wave.observer:
            wave.observer.global_access(instruction, cohort.threads[good], address[good], size)
        return np.where(good, at, 0), good

    def check_read(self, instruction: Instruction, cohort: Cohort, at: Array, inside: Array, size: int) -> None:
        at, local = at[inside], cohort.threads[inside]
        if not len(at):
            return
        wave = self.wave
        written = wave.memory.written[at[:, None] + np.arange(size)]
        if not written.all():
            n, k = np.argwhere(~written)[0]
            where = f"{wave.thread_name(local[n])}: {wave.memory.describe_index(int(at[n] + k))}"
            count = int((~written.all(1)).sum())
            wave.findings.add("global memory: reads what nobody has written", instruction, count, where)
        if wave.races:
            granules = self.granules(at, size)
            wave.launch.global_history.check_read(instruction, local + wave.first_thread, granules)


def new_history(clocks, memory: GlobalMemory, granule: int, report) -> AccessHistory:
    """Before the launch somebody has written everything."""
    return AccessHistory(clocks, -(-len(memory.data) // granule), report, writer=BEFORE_LAUNCH)
