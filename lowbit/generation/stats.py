"""What a run of generation did and how long it took."""

import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Stats:
    """prompt_tokens and new_tokens count all rows of the batch, padding not. reused_tokens: those of the prompt that
    were in the cache already. path: what made the tokens; why: what kept a faster one from it, if anything did.
    inputs: what products did to their inputs: "exact", or how they were rounded. accepted_tokens are those of the
    drafted_tokens that the model would have given itself. first_tokens came with the prefill: one of each row, and what
    a draft added to it.

    prefill_seconds end with the first token, setup_seconds (capturing or compiling the step) lie between that and
    decode_seconds.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    setup_seconds: float = 0.0
    decode_seconds: float = 0.0
    path: str = "static loop"
    why: str | None = None
    first_tokens: int = 1
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    inputs: str = "exact"

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.setup_seconds + self.decode_seconds

    @property
    def time_to_first_token(self) -> float:
        return self.prefill_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after those that the prefill gives."""
        return _rate(self.new_tokens - self.first_tokens, self.decode_seconds)

    def as_dict(self) -> dict:
        rates = ("seconds", "time_to_first_token", "prefill_tokens_per_second", "decode_tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}


def _rate(tokens: int, seconds: float) -> float:
    return max(tokens, 0) / seconds if seconds else 0.0


@dataclass
class DraftCounts:
    """Tokens that were drafted, how many of them were accepted, and how many of those in the first check."""

    drafted: int = 0
    accepted: int = 0
    early: int = 0


class RunMetrics:
    """What is counted and timed while a run goes on. A phase lasts from the end of the one before it."""

    def __init__(self) -> None:
        self.reused_tokens = 0
        self.prefill_seconds = self.setup_seconds = self.decode_seconds = 0.0
        self.drafts = DraftCounts()
        self._last = time.perf_counter()

    def end_prefill(self) -> None:
        self.prefill_seconds = self._lap()

    def end_setup(self) -> None:
        self.setup_seconds = self._lap()

    def end_decode(self) -> None:
        self.decode_seconds = self._lap()

    def stats(self, mask: torch.Tensor, lengths: list[int], path: str, why: str | None, inputs: str = "exact") -> Stats:
        """Of a prompt with this mask [B, T], and of so many new tokens in each row."""
        return Stats(
            prompt_tokens=int(mask.sum()),
            new_tokens=sum(lengths),
            reused_tokens=self.reused_tokens,
            prefill_seconds=self.prefill_seconds,
            setup_seconds=self.setup_seconds,
            decode_seconds=self.decode_seconds,
            path=path,
            why=why,
            first_tokens=len(lengths) + self.drafts.early,
            drafted_tokens=self.drafts.drafted,
            accepted_tokens=self.drafts.accepted,
            inputs=inputs,
        )

    def _lap(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before
