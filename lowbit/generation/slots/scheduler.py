"""One thread that runs requests: together in slots, or alone where they cannot be."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lowbit.generation.request import Request
from lowbit.generation.slots.slots import End, Slots


@dataclass(eq=False)
class Job:
    """What is to be run.

    alone: runs it, to its end. end: called once it is over, with what went wrong, if anything did. wanted: asked when
    its turn comes; what nobody wants any more is over then.
    request, on_token: what a slot takes, for what may be in one.
    """

    alone: Callable[[], None]
    end: End = lambda error: None
    wanted: Callable[[], bool] = lambda: True
    request: Request | None = None
    on_token: Callable[[list[int]], bool | None] = lambda tokens: None
    shares: bool | None = field(default=None, init=False)  # once it is known


class Scheduler:
    """Runs jobs in the order in which they are submitted. A job joins those that run as soon as a slot is free; one
    that has to run alone waits until all have left, and those behind it wait, too. While requests run, no more than
    `chunk` positions of prompts are run between two steps, one chunk at least.

    slots: None for none.
    """

    def __init__(self, slots: Slots | None, chunk: int, name: str):
        self.slots, self.chunk = slots, chunk
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed, self._prompted = False, 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            self._jobs.append(job)
            self._changed.notify()

    def close(self) -> list[Job]:
        """Take no more, and run none of those that wait, which are returned. What runs goes on."""
        with self._changed:
            self._closed, waiting = True, [*self._jobs]
            self._jobs.clear()
            self._changed.notify()
        return waiting

    def join(self) -> None:
        """Wait for what runs; `close` comes before."""
        self._thread.join()

    @property
    def _running(self) -> bool:
        return self.slots is not None and bool(self.slots.rows)

    def _run(self) -> None:
        while self._wait():
            while (job := self._next()) is not None:
                self._start(job)
            self._step()

    def _wait(self) -> bool:
        """Until there is something to do. Returns whether there is, and not just the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._jobs or self._closed)
            return self._running or bool(self._jobs)

    def _next(self) -> Job | None:
        """The first job, if it can run now."""
        with self._changed:
            job = self._jobs[0] if self._jobs else None
        if job is None or (self._running and not (self.slots.free and self._shares(job))):  # type: ignore[union-attr]
            return None
        with self._changed:
            return self._jobs.popleft() if self._jobs else None  # this thread alone takes one; `close` takes all

    def _shares(self, job: Job) -> bool:
        if job.shares is None:
            job.shares = self.slots is not None and job.request is not None and self.slots.takes(job.request)
        return job.shares

    def _start(self, job: Job) -> None:
        error = None
        try:
            if job.wanted():
                if self._shares(job):
                    assert self.slots is not None and job.request is not None
                    self.slots.join(job.request, job.on_token, job.end, self._after_chunk)
                    return
                job.alone()
        except Exception as caught:
            error = caught
        job.end(error)

    def _after_chunk(self, positions: int) -> None:
        self._prompted += positions
        if self._prompted >= self.chunk:
            self._step()

    def _step(self) -> None:
        self._prompted = 0
        if self._running:
            self.slots.step()  # type: ignore[union-attr]
