"""Where threads meet: bar.sync, bar.warp.sync, mbarriers, fences, setmaxnreg (PTX ISA 9.7.13)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from machine.emit import SHARED_BASE
from machine.program import Immediate, Instruction, PtxError
from machine.races import Knowledge
from machine.threads import LANES, Array, Cohort, Fault, Unit, whole_warps

# What a thread is doing, and why it cannot go on
RUNNING, AT_BARRIER, AT_MBARRIER, FOR_REGISTERS, DONE = range(5)
STATES = ("running", "at a barrier", "at an mbarrier", "waiting for registers", "done")


@dataclass
class Meeting:
    """Threads that have arrived at a barrier of a CTA; expected: how many, None for all that are left."""

    instruction: Instruction
    expected: int | None
    arrived: list[Array]


class BarrierUnit(Unit):
    """bar.sync and barrier.sync of a CTA, bar.warp.sync, and fences."""

    OPCODES: ClassVar = {
        "bar.warp.sync": "warp_sync", "fence.proxy.async": "fence_proxy", "fence.mbarrier_init": "order_nothing",
        "membar": "order_nothing", "fence.acq_rel": "order_nothing", "fence.sc": "order_nothing",
    }  # fmt: skip
    MEETINGS: ClassVar = {"bar.sync": "wait", "barrier.sync": "wait"}

    def __init__(self, wave):
        super().__init__(wave)
        self.open: dict[tuple[int, int], Meeting] = {}  # (CTA, number)

    def wait(self, instruction: Instruction, cohort: Cohort, following: int) -> None:
        """Barrier `a`, of all threads of the CTA or of `b`: the scheduler goes on."""
        whole_warps(instruction, cohort)
        wave, operands = self.wave, instruction.operands
        numbers = np.unique(wave.value(cohort, operands[0]))
        if len(numbers) > 1 or (len(operands) > 1 and not isinstance(operands[1], Immediate)):
            raise PtxError(f"unknown instruction, {instruction}")
        expected = operands[1].pattern if len(operands) > 1 else None
        wave.state[cohort.threads] = AT_BARRIER
        wave.at[cohort.threads] = following
        ctas = cohort.threads // wave.threads_per_cta
        for cta in np.unique(ctas):
            key = (int(cta), int(numbers[0]))
            meeting = self.open.setdefault(key, Meeting(instruction, expected, []))
            if meeting.expected != expected:
                raise Fault(f"barrier {key[1]} is for {meeting.expected} and {expected} threads: {instruction}")
            meeting.arrived.append(cohort.threads[ctas == cta])
            self.settle(key)

    def settle(self, key: tuple[int, int]) -> None:
        """Do all go on now?"""
        wave, meeting = self.wave, self.open[key]
        threads, expected = np.concatenate(meeting.arrived), meeting.expected
        if expected is None:
            of_cta = slice(key[0] * wave.threads_per_cta, (key[0] + 1) * wave.threads_per_cta)
            expected = int((wave.state[of_cta] != DONE).sum())
        if len(threads) > expected:
            raise Fault(f"{len(threads)} threads at a barrier for {expected}: {meeting.instruction}")
        if len(threads) == expected:
            del self.open[key]
            warps = wave.warps_in_grid(np.unique(threads // LANES))
            wave.clocks.acquire(warps, wave.clocks.release(warps))
            wave.state[threads] = RUNNING

    def settle_cta(self, cta: int) -> None:
        """After threads of a CTA have ended."""
        for key in [key for key in self.open if key[0] == cta]:
            self.settle(key)

    def warp_sync(self, instruction: Instruction, cohort: Cohort) -> None:
        if instruction.operands[0].pattern & 0xFFFFFFFF != 0xFFFFFFFF:
            raise PtxError(f"unknown instruction, {instruction}")
        self.wave.clocks.tick(self.wave.warps_in_grid(whole_warps(instruction, cohort)))

    def fence_proxy(self, _: Instruction, cohort: Cohort) -> None:
        self.wave.clocks.fence_proxy(self.wave.warps_in_grid(np.unique(cohort.threads // LANES)))

    def order_nothing(self, instruction: Instruction, cohort: Cohort) -> None:
        """A fence of the generic proxy. Nothing we ship relies on one, so none orders anything here."""


class MBarrier:
    """Counts arrivals and bytes; when both are complete its phase ends, and whoever waits has heard of the rest."""

    def __init__(self, count: int, nothing: Knowledge):
        self.count = self.pending = count
        self.bytes = 0  # that are expected and have not arrived
        self.phase = 0
        self.collecting = self.collected = nothing

    def arrive(self, expected_bytes: int, knowledge: Knowledge, instruction: Instruction) -> None:
        if self.pending == 0:
            raise Fault(f"more arrivals at an mbarrier than the {self.count} expected: {instruction}")
        self.bytes += expected_bytes
        self.pending -= 1
        self.collect(knowledge)

    def complete(self, count: int, knowledge: Knowledge) -> None:
        """`count` bytes have arrived."""
        self.bytes -= count
        self.collect(knowledge)

    def collect(self, knowledge: Knowledge) -> None:
        self.collecting = tuple(np.maximum(a, b) for a, b in zip(self.collecting, knowledge, strict=True))

    def settle(self) -> bool:
        """Does the phase end now?"""
        if self.pending or self.bytes:
            return False
        self.phase += 1
        self.pending = self.count
        self.collected = tuple(np.maximum(a, b) for a, b in zip(self.collected, self.collecting, strict=True))
        return True


class MBarrierUnit(Unit):
    """mbarrier objects by CTA and address. setmaxnreg waits in the same way."""

    OPCODES: ClassVar = {
        "mbarrier.init.shared::cta": "init", "mbarrier.inval": "invalidate", "mbarrier.arrive.shared::cta": "arrive",
        "mbarrier.arrive.expect_tx": "arrive", "mbarrier.arrive.release": "arrive",
    }  # fmt: skip
    MEETINGS: ClassVar = {"mbarrier.try_wait.parity": "wait"}

    def __init__(self, wave):
        super().__init__(wave)
        self.made: dict[tuple[int, int], MBarrier] = {}

    def init(self, instruction: Instruction, cohort: Cohort) -> None:
        wave, shared = self.wave, self.wave.shared
        address = shared.address(cohort, instruction.operands[0])
        at = shared.locate(instruction, cohort.threads, address, 8)
        if wave.races:
            threads, granules = cohort.threads + wave.first_thread, shared.granules(at, 8)
            shared.history.check_write(instruction, threads, granules)
            shared.history.note_write(threads, granules)
        for thread, where in zip(cohort.threads, address, strict=True):
            made = MBarrier(instruction.operands[1].pattern, wave.clocks.nothing())
            self.made[int(thread) // wave.threads_per_cta, int(where)] = made

    def invalidate(self, instruction: Instruction, cohort: Cohort) -> None:
        for thread, where in zip(
            cohort.threads, self.wave.shared.address(cohort, instruction.operands[0]), strict=True
        ):
            self.find(instruction, thread, where)
            del self.made[int(thread) // self.wave.threads_per_cta, int(where)]

    def find(self, instruction: Instruction, thread: int, address: int, asynchronous: bool = False) -> MBarrier:
        """The mbarrier that a thread of the wave names, of whose start it must have heard."""
        wave = self.wave
        cta = int(thread) // wave.threads_per_cta
        if (cta, int(address)) not in self.made:
            raise Fault(f"no mbarrier at byte {int(address) - SHARED_BASE}: {instruction}")
        if wave.races:
            at = np.array([int(address) - SHARED_BASE + cta * wave.shared.size])
            in_grid = np.array([int(thread) + wave.first_thread])
            wave.shared.history.check_read(instruction, in_grid, wave.shared.granules(at, 8), asynchronous)
        return self.made[cta, int(address)]

    def arrive(self, instruction: Instruction, cohort: Cohort) -> None:
        wave, operands = self.wave, instruction.operands
        expects = "expect_tx" in instruction.parts
        known = {"mbarrier", "arrive", "expect_tx", "release", "cta", "shared", "shared::cta", "b64"}
        if operands[0] is not None or len(operands) != 2 + expects or not set(instruction.parts) <= known:
            raise PtxError(f"unknown instruction, {instruction}")
        expected_bytes = wave.value(cohort, operands[2]) if expects else np.zeros(cohort.count, int)
        address = wave.shared.address(cohort, operands[1])
        for thread, where, count in zip(cohort.threads, address, expected_bytes, strict=True):
            barrier = self.find(instruction, thread, where)
            warp = np.array([(int(thread) + wave.first_thread) // LANES])
            barrier.arrive(int(count), wave.clocks.release(warp), instruction)
            self.settle(barrier)

    def settle(self, barrier: MBarrier) -> None:
        if barrier.settle():
            self.wake_all()

    def wake_all(self) -> None:
        """Who waits tries again."""
        state = self.wave.state
        state[(state == AT_MBARRIER) | (state == FOR_REGISTERS)] = RUNNING

    def wait(self, instruction: Instruction, cohort: Cohort, following: int) -> int | None:
        """try_wait.parity is true once the phase of that parity has ended; here it suspends until then."""
        wave = self.wave
        address = wave.shared.address(cohort, instruction.operands[1])
        parity = wave.value(cohort, instruction.operands[2])
        through = np.zeros(cohort.count, bool)
        warps = cohort.threads // LANES
        for warp in np.unique(warps):
            lanes = np.flatnonzero(warps == warp)
            if len(np.unique(address[lanes])) > 1 or len(np.unique(parity[lanes])) > 1:
                raise PtxError(f"lanes wait for different mbarriers, {instruction}")
            barrier = self.find(instruction, cohort.threads[lanes[0]], address[lanes[0]])
            if barrier.phase & 1 != parity[lanes[0]]:
                through[lanes] = True
                wave.clocks.acquire(wave.warps_in_grid(np.array([warp])), barrier.collected)
        wave.set(cohort, instruction.operands[0], True)
        return self.suspend(instruction, cohort, ~through, AT_MBARRIER, following)

    def suspend(self, instruction: Instruction, cohort: Cohort, stay: Array, state: int, following: int) -> int | None:
        """Threads that `stay` try the instruction again when they are woken."""
        wave = self.wave
        if not stay.any():
            return following
        wave.at[cohort.threads] = np.where(stay, wave.segment_of(instruction), following)
        wave.state[cohort.threads[stay]] = state
        return None


class RegisterUnit(Unit):
    """setmaxnreg: registers move between warpgroups through a pool of the CTA (PTX ISA 9.7.20)."""

    MEETINGS: ClassVar = {"setmaxnreg.inc": "change", "setmaxnreg.dec": "change"}

    def __init__(self, wave):
        super().__init__(wave)
        self.pool = np.zeros(wave.ctas, np.int64)
        self.granted = np.full(wave.total // LANES, wave.launch.program.max_registers, np.int64)

    def change(self, instruction: Instruction, cohort: Cohort, following: int) -> int | None:
        """`inc` waits until there are enough."""
        wave, number = self.wave, instruction.operands[0].pattern
        if number % 8 or not 24 <= number <= 256:
            raise Fault(f"no such number of registers: {instruction}")
        waits = np.zeros(cohort.count, bool)
        for warp in whole_warps(instruction, cohort):
            cta = warp // wave.warps_per_cta
            more = (number - self.granted[warp]) * LANES
            if (more < 0) if instruction.has("setmaxnreg.inc") else (more > 0):
                raise Fault(f"from {self.granted[warp]} registers: {instruction}")
            if more > self.pool[cta]:
                waits[cohort.threads // LANES == warp] = True
                continue
            self.pool[cta] -= more
            self.granted[warp] = number
            if more < 0:
                wave.mbarriers.wake_all()
        return wave.mbarriers.suspend(instruction, cohort, waits, FOR_REGISTERS, following)
