"""Who may see what: vector clocks of warps, and what they say about each access to memory (PTX ISA, chapter 8).

A warp's own clock ticks at everything that orders its accesses for others: a barrier, a warp barrier, a release. An
access of a thread is recorded with the clock of its warp. It is ordered before what another warp does now if that warp
has heard of the clock by barriers, mbarriers, or release and acquire. Lanes of one warp are ordered by warp barriers.

A rule that an access breaks is broken in any order of the threads, not only in the one that was drawn.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from machine.threads import LANES, NOBODY, SEVERAL, Array

# (rule, instruction, how many accesses, thread, granule, other thread)
Report = Callable[[str, Any, int, int, int, int], None]
Knowledge = tuple[Array, Array]  # clocks of all warps: heard of, and covered by proxy fences on the way


class Clocks:
    """One row for each warp of the grid, and one that stands for nobody."""

    def __init__(self, warps: int):
        self.own = np.ones(warps, np.int32)
        self.heard = np.zeros((warps + 1, warps + 1), np.int32)  # [warp, of]
        self.fenced = np.zeros((warps + 1, warps + 1), np.int32)

    def release(self, warps: Array) -> Knowledge:
        """What `warps` did and heard of, for others to acquire. Their clocks tick."""
        heard, fenced = self.heard[warps].max(0), self.fenced[warps].max(0)
        heard[warps] = self.own[warps]
        self.tick(warps)
        return heard, fenced

    def acquire(self, warps: Array, knowledge: Knowledge) -> None:
        heard, fenced = knowledge
        self.heard[warps] = np.maximum(self.heard[warps], heard)
        self.fenced[warps] = np.maximum(self.fenced[warps], fenced)

    def tick(self, warps: Array) -> None:
        """Lanes of each warp hear of each other."""
        self.heard[warps, warps] = self.own[warps]
        self.own[warps] += 1

    def fence_proxy(self, warps: Array) -> None:
        """What `warps` heard of, and their own accesses, are visible to the asynchronous proxy from now on."""
        self.tick(warps)
        self.fenced[warps] = np.maximum(self.fenced[warps], self.heard[warps])

    def nothing(self) -> Knowledge:
        return np.zeros_like(self.heard[0]), np.zeros_like(self.fenced[0])


class AccessHistory:
    """The last writer of each granule of a memory: its thread (counted through the grid), clock and proxy."""

    def __init__(self, clocks: Clocks, granules: int, report: Report, writer: int = NOBODY):
        self.clocks, self.report = clocks, report
        self.writer = np.full(granules, writer, np.int32)
        self.written = np.zeros(granules, np.int32)  # clock of the writer's warp
        self.generic = np.zeros(granules, bool)  # through the generic proxy

    def check_read(self, instruction: object, threads: Array, granules: Array) -> None:
        """threads [n], granules [n, k]."""
        bad = self.unordered(threads, granules, self.writer[granules])
        if bad.any():
            self.tell("reads what another thread writes, unordered", instruction, threads, granules, bad)

    def check_write(self, instruction: object, threads: Array, granules: Array, changes: Array | bool = True) -> None:
        """changes [n]: does a thread write anything new? Threads may race to write the same."""
        bad = self.unordered(threads, granules, self.writer[granules]) & np.asarray(changes)[..., None]
        if bad.any():
            self.tell("writes what another thread has written, unordered", instruction, threads, granules, bad)

    def unordered(self, threads: Array, granules: Array, writer: Array) -> Array:
        known = self.clocks.heard[(threads // LANES)[:, None], writer // LANES] >= self.written[granules]
        return (writer >= 0) & (writer != threads[:, None]) & ~known

    def note_write(self, threads: Array, granules: Array, generic: bool = True, clock: Array | None = None) -> None:
        """clock [n]: of an asynchronous write that was started earlier."""
        self.writer[granules] = threads[:, None]
        self.written[granules] = (self.clocks.own[threads // LANES] if clock is None else clock)[:, None]
        self.generic[granules] = generic

    def check_one_writer(self, instruction: object, threads: Array, granules: Array) -> None:
        """After a store of several threads at once."""
        bad = self.writer[granules] != threads[:, None]
        if bad.any():
            self.tell("is written by two threads at once", instruction, threads, granules, bad)

    def tell(
        self, rule: str, instruction: object, threads: Array, granules: Array, bad: Array, other: Array | None = None
    ) -> None:
        n, k = np.argwhere(bad)[0]
        other = self.writer[granules] if other is None else other
        self.report(rule, instruction, int(bad.any(1).sum()), int(threads[n]), int(granules[n, k]), int(other[n, k]))


class SharedHistory(AccessHistory):
    """Of shared memory also the last reader in each warp, and what copies and wgmmas in flight write and read."""

    def __init__(self, clocks: Clocks, report: Report, ctas: int, granules: int, first_warps: Array, warps: int):
        """granules: of a CTA; first_warps [ctas]: the first warp, in the grid, of each CTA; warps: of a CTA."""
        super().__init__(clocks, ctas * granules, report)
        self.granules_per_cta, self.first_warps = granules, first_warps
        self.starts = np.arange(warps) * (ctas * granules)  # of each warp of a CTA in what is kept by warp and granule
        self.read_at = np.zeros(warps * ctas * granules, np.int32)  # clock of the reader's warp
        self.reader = np.full(warps * ctas * granules, NOBODY, np.int32)
        self.in_flight = np.zeros(ctas * granules, bool)  # an asynchronous write has started
        self.being_read = np.zeros(ctas * granules, np.int16)  # asynchronous reads that have started

    def check_read(self, instruction: object, threads: Array, granules: Array, asynchronous: bool = False) -> None:
        super().check_read(instruction, threads, granules)
        writer = self.writer[granules]
        if (never := writer == NOBODY).any():
            self.tell("reads what nobody has written", instruction, threads, granules, never)
        if (flying := self.in_flight[granules]).any():
            self.tell("reads what an asynchronous copy is writing", instruction, threads, granules, flying)
        if asynchronous:
            covered = self.clocks.fenced[(threads // LANES)[:, None], writer // LANES] >= self.written[granules]
            unfenced = self.generic[granules] & (writer >= 0) & ~covered
            if unfenced.any():
                rule = "reads asynchronously what was written generically, without a proxy fence"
                self.tell(rule, instruction, threads, granules, unfenced)

    def note_read(self, threads: Array, granules: Array) -> None:
        warp, thread = threads // LANES, threads[:, None]
        local = warp - self.first_warps[granules[:, 0] // self.granules_per_cta]
        at = self.starts[local][:, None] + granules
        now = self.clocks.own[warp][:, None]
        others = (self.read_at.take(at) == now) & (self.reader.take(at) != thread)
        reader = np.where(others, SEVERAL, thread).astype(np.int32)
        self.read_at[at] = now
        self.reader[at] = reader
        several = self.reader.take(at) != reader  # lanes of this very read
        if several.any():
            self.reader[at[several]] = SEVERAL

    def check_write(self, instruction: object, threads: Array, granules: Array, changes: Array | bool = True) -> None:
        super().check_write(instruction, threads, granules, changes)
        warp = threads // LANES
        readers = self.first_warps[granules[:, 0] // self.granules_per_cta] + np.arange(len(self.starts))[:, None]
        at = self.starts[:, None, None] + granules  # [warp of the CTA, thread, granule]
        bad = self.read_at.take(at) > self.clocks.heard[warp, readers][:, :, None]
        if bad.any():
            reader = self.reader.take(at)
            bad &= ~((readers == warp)[:, :, None] & (reader == threads[:, None]))
        for local in np.flatnonzero(bad.any((1, 2))):
            rule = "writes what another thread has read, unordered"
            self.tell(rule, instruction, threads, granules, bad[local], reader[local])
        if (flying := self.in_flight[granules]).any():
            self.tell("writes what an asynchronous copy is writing", instruction, threads, granules, flying)
        if (busy := self.being_read[granules] > 0).any():
            self.tell("writes what a running wgmma reads", instruction, threads, granules, busy)

    def start_write(self, instruction: object, threads: Array, granules: Array) -> None:
        """An asynchronous copy: until it lands nobody may touch the place."""
        self.check_write(instruction, threads, granules)
        self.in_flight[granules] = True

    def land(self, threads: Array, granules: Array, generic: bool, clock: Array | None = None) -> None:
        self.in_flight[granules] = False
        self.note_write(threads, granules, generic, clock)
