"""Cores that other processes leave free, for those who wait at barriers: there one thread without a core stops all."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
# Of a line of /proc/stat: user, nice, system, irq, softirq, steal; not idle and iowait
_BUSY = (1, 2, 3, 6, 7, 8)
# What others may use of a core that still counts as free: a busy system does a little on all of them
_SLACK = 0.3


@dataclass(frozen=True)
class Reading:
    """seconds: of a clock. busy: seconds that all cores which this process may use have worked, summed. own: seconds
    of processor time of this process. cores: how many there are."""

    seconds: float
    busy: float
    own: float
    cores: int


def read() -> Reading | None:
    """None where the system does not say it."""
    try:
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in _STAT.read_text().splitlines() if line.startswith("cpu")]
        ticks = [int(line[field]) for line in lines if line[0] in mine for field in _BUSY]
        busy = sum(ticks) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):
        return None
    return Reading(time.perf_counter(), busy, time.process_time(), len(mine))


class FreeCores:
    """Counts free cores anew every `period` seconds.

    `limit(threads)` gives the threads, one at least, that have a core each; all of them until something is known. own
    threads that wait in a loop count as this process's work, so that it never gives way to itself.
    """

    def __init__(self, period: float = 0.25, reader: Callable[[], Reading | None] = read):
        self._period, self._reader = period, reader
        self._last, self._free = reader(), None

    def limit(self, threads: int) -> int:
        if threads > 1 and self._last is not None and time.perf_counter() - self._last.seconds >= self._period:
            self._count(self._last)
        return threads if self._free is None else max(1, min(threads, self._free))

    def _count(self, before: Reading) -> None:
        now = self._last = self._reader()
        if now is None:
            self._free = None
            return
        others = (now.busy - before.busy) - (now.own - before.own)
        self._free = int(now.cores - max(others, 0.0) / (now.seconds - before.seconds) + _SLACK)
