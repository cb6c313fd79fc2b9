"""The tokens of a batch as they come to the host, and whether there is more to come."""

from collections.abc import Callable

import torch

from lowbit.errors import InputError
from lowbit.generation.sampling import NO_TOKEN
from lowbit.generation.stats import RunMetrics

BAD_LOGITS = "the model gives NaN or infinite logits: its weights are damaged or its dtype overflows (try bfloat16)"


class Answer:
    """take(tokens) of one step after the other, B each; `ended` once every row has had an end token, or `on_token`,
    which is called with each step's tokens, has said so by returning True. The prefill ends with the first of them in
    `metrics`."""

    def __init__(
        self,
        batch: int,
        eos: tuple[int, ...],
        on_token: Callable[[list[int]], bool | None] | None = None,
    ):
        self.eos, self.on_token = set(eos), on_token
        self.metrics = RunMetrics()
        self.steps: list[list[int]] = []
        self.lengths = [0] * batch
        self.open = [True] * batch
        self.ended = False

    def take(self, tokens: list[int]) -> bool:
        """Returns whether that was the last. Raises InputError where the logits were no numbers."""
        if not self.steps:
            self.metrics.end_prefill()
        if any(self.open[row] and token == NO_TOKEN for row, token in enumerate(tokens)):
            raise InputError(BAD_LOGITS)
        self.steps.append(tokens)
        for row, token in enumerate(tokens):
            self.lengths[row] += self.open[row]
            self.open[row] &= token not in self.eos
        stop = self.on_token is not None and self.on_token(tokens)
        self.ended = bool(stop) or not any(self.open)
        return self.ended

    def tokens(self) -> torch.Tensor:
        """[B, N]"""
        return torch.tensor(self.steps, dtype=torch.long).reshape(-1, len(self.lengths)).T
