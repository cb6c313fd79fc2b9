"""A server whose model several processes share: the first one listens, the others make the steps that it makes."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

from lowbit.errors import LowbitError, OutputError
from lowbit.parallel import ranks_of

# Well below what a process waits for the others
_SECONDS_BETWEEN_SIGNS_OF_LIFE = 3600.0
_NOTHING = ("nothing", None, None)


class Together:
    """What the first process tells the others: to generate, or that there is no more to do. All calls come from one
    thread, in their order. lost: why the others cannot be told any more."""

    def __init__(self, session, submit: Callable[[Callable[[], None]], Any]):
        """submit: runs a function in the thread of the answers."""
        self.session, self.submit = session, submit
        self.ranks = ranks_of(session.model)
        self.lost: LowbitError | None = None
        self._ended = threading.Event()
        if self.ranks is not None:
            threading.Thread(target=self._stay_known, name="lowbit-signs-of-life", daemon=True).start()

    def generate(self, ids: torch.Tensor, on_token: Callable[[list[int]], bool], **given: Any) -> None:
        """`Decoder.generate`, in all processes."""
        try:
            self._tell(("generate", ids.cpu(), given))
            self.session.decoder.generate(ids, **given, on_token=on_token)
        except OutputError as error:
            self._lose(error)
            raise

    def end(self) -> None:
        self._ended.set()
        if self.lost is None:
            self._tell(None)

    def _tell(self, what: tuple | None) -> None:
        if self.ranks is not None:
            self.ranks.of_first(lambda: what)

    def _stay_known(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_SIGNS_OF_LIFE):
            self.submit(lambda: self._tell(_NOTHING))

    def _lose(self, error: OutputError) -> None:
        """Without the others there is no server."""
        if self.ranks is not None and self.lost is None:
            self.lost = error
            signal.raise_signal(signal.SIGTERM)


def follow(session) -> None:
    """Make the steps of the first process until it ends, in one that does not listen. Signals are for the first one: it
    finishes what runs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ranks = ranks_of(session.model)
    assert ranks is not None
    while (told := ranks.of_first(lambda: None)) is not None:
        what, ids, given = told
        if what == "generate":
            try:
                session.decoder.generate(ids, **given)
            except OutputError:
                raise
            except LowbitError:
                pass  # the first process has it too, and tells it
