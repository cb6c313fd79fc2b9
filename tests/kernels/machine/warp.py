"""What the lanes of a warp do together: shuffles, votes, matrices to and from shared memory, mma.sync."""

from typing import ClassVar

import numpy as np

from machine import fragments
from machine.program import Instruction, PtxError, Vector
from machine.threads import LANES, Array, Cohort, Unit, whole_warps

FULL_MASK = 0xFFFFFFFF
MATRIX_ROW = 16  # bytes
INPUTS = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k32", "s8")}


class WarpUnit(Unit):
    OPCODES: ClassVar = {
        "shfl.sync": "shuffle", "redux.sync": "reduce", "elect.sync": "elect", "ldmatrix.sync.aligned.m8n8": "load",
        "stmatrix.sync.aligned.m8n8": "store", "mma.sync.aligned": "multiply",
    }  # fmt: skip

    def __init__(self, wave):
        super().__init__(wave)
        self.leader = int(wave.random.integers(LANES))

    def lanes(self, cohort: Cohort, operand: object) -> Array:
        """A 32-bit operand as [warps, 32]."""
        return np.ascontiguousarray(self.wave.value(cohort, operand)).reshape(-1, LANES)

    def all_of(self, instruction: Instruction, cohort: Cohort, mask: object) -> None:
        """Raise unless whole warps are here, and the member mask says so."""
        whole_warps(instruction, cohort)
        if (self.wave.value(cohort, mask) != FULL_MASK).any():
            raise PtxError(f"a mask that is not all lanes, {instruction}")

    def shuffle(self, instruction: Instruction, cohort: Cohort) -> None:
        """PTX ISA 9.7.9.6. A lane whose source is out of bounds gets its own value."""
        if instruction.parts[-1] != "b32" or len(instruction.operands) != 5:
            raise PtxError(f"unknown instruction, {instruction}")
        to, source, index, clamp, mask = instruction.operands
        self.all_of(instruction, cohort, mask)
        values = self.lanes(cohort, source)
        index, limits = (self.lanes(cohort, one).astype(np.int64) for one in (index, clamp))
        lane, segment, bound = np.arange(LANES), limits >> 8 & 31, limits & 31
        last, index = (lane & segment) | (bound & ~segment), index & 31
        mode = instruction.parts[2]
        if mode == "idx":
            from_lane = (lane & segment) | (index & ~segment)
        elif mode == "bfly":
            from_lane = lane ^ index
        elif mode == "down":
            from_lane = lane + index
        elif mode == "up":
            from_lane = lane - index
        else:
            raise PtxError(f"unknown instruction, {instruction}")
        inside = from_lane >= last if mode == "up" else from_lane <= last
        shuffled = np.take_along_axis(values, np.where(inside, from_lane, lane), 1).ravel()
        if isinstance(to, Vector):
            to, predicate = to.items
            self.wave.set(cohort, predicate, inside.ravel())
        self.wave.set(cohort, to, shuffled)

    def reduce(self, instruction: Instruction, cohort: Cohort) -> None:
        """redux.sync.max and min of 32-bit integers."""
        to, source, mask = instruction.operands
        self.all_of(instruction, cohort, mask)
        operation = {"max": np.max, "min": np.min}.get(instruction.parts[2])
        dtype = {"s32": np.int32, "u32": np.uint32}.get(instruction.parts[3])
        if operation is None or dtype is None:
            raise PtxError(f"unknown instruction, {instruction}")
        reduced = operation(self.lanes(cohort, source).view(dtype), 1)
        self.wave.set(cohort, to, np.repeat(reduced, LANES).view(np.uint32))

    def elect(self, instruction: Instruction, cohort: Cohort) -> None:
        """Any lane, which is another one in each wave."""
        (lane, elected), mask = instruction.operands[0].items, instruction.operands[1]
        self.all_of(instruction, cohort, mask)
        self.wave.set(cohort, lane, np.uint32(self.leader))
        self.wave.set(cohort, elected, cohort.threads % LANES == self.leader)

    @staticmethod
    def shape(instruction: Instruction) -> tuple[int, bool]:
        """Matrices that an ldmatrix or stmatrix moves, and whether it transposes them."""
        count, *how, space, kind = instruction.parts[4:]
        if how not in ([], ["trans"]) or space not in ("shared", "shared::cta") or kind != "b16":
            raise PtxError(f"unknown instruction, {instruction}")
        return int(count[1:]), how == ["trans"]

    def matrix_rows(self, instruction: Instruction, cohort: Cohort, address: object, count: int) -> tuple[Array, Array]:
        """Threads that name a row each, and where it starts: lane 8 * m + r has row r of matrix m."""
        whole_warps(instruction, cohort)
        threads = cohort.threads.reshape(-1, LANES)[:, : 8 * count].ravel()
        starts = self.wave.shared.address(cohort, address).reshape(-1, LANES)[:, : 8 * count].ravel()
        return threads, self.wave.shared.locate(instruction, threads, starts, MATRIX_ROW)

    def load(self, instruction: Instruction, cohort: Cohort) -> None:
        """ldmatrix (PTX ISA 9.7.14.5.15)."""
        count, transposed = self.shape(instruction)
        threads, at = self.matrix_rows(instruction, cohort, instruction.operands[1], count)
        self.wave.shared.check_read(instruction, threads, at, MATRIX_ROW)
        rows = self.wave.shared.data[at[:, None] + np.arange(MATRIX_ROW)].view(np.uint16).reshape(-1, 8, 8)
        words = fragments.matrices_of_rows(rows.transpose(0, 2, 1) if transposed else rows)
        to = instruction.operands[0]
        for n, register in enumerate(to.items if isinstance(to, Vector) else (to,)):
            self.wave.set(cohort, register, words[n::count].ravel())

    def store(self, instruction: Instruction, cohort: Cohort) -> None:
        """stmatrix (PTX ISA 9.7.14.5.16)."""
        count, transposed = self.shape(instruction)
        threads, at = self.matrix_rows(instruction, cohort, instruction.operands[0], count)
        source = instruction.operands[1]
        registers = source.items if isinstance(source, Vector) else (source,)
        words = np.stack([self.lanes(cohort, register) for register in registers], 1)  # [warp, matrix, lane]
        rows = fragments.rows_of_matrices(words.reshape(-1, LANES))
        rows = rows.transpose(0, 2, 1) if transposed else rows
        self.wave.shared.write(instruction, threads, at, np.ascontiguousarray(rows).reshape(-1, 8))

    def multiply(self, instruction: Instruction, cohort: Cohort) -> None:
        """mma.sync D = A B + C, summed in float64 and rounded once (PTX ISA 9.7.14)."""
        whole_warps(instruction, cohort)
        shape, *layouts, to, kind, other, into = instruction.parts[3:]
        saturating = layouts == ["row", "col", "satfinite"]
        accumulates = "s32" if kind == "s8" else "f32"
        known = (shape, kind) in INPUTS and kind == other and to == into == accumulates
        if not known or not (layouts == ["row", "col"] or (saturating and kind == "s8")):
            raise PtxError(f"unknown instruction, {instruction}")
        to_registers, *sources = (operand.items for operand in instruction.operands)
        a, b, c = (self.wave.words(cohort, source) for source in sources)
        product = np.matmul(fragments.left_operand(a, kind), fragments.right_operand(b, kind))
        total = fragments.accumulator_registers(product) + fragments.accumulators(c, accumulates)
        self.wave.set_words(cohort, to_registers, fragments.rounded(total, accumulates, saturating))
