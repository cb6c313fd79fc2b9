"""Picking the next token: transformers' processors, in its order, without a look at any value on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.errors import UsageError

NO_TOKEN = -1  # stands for a row whose logits are NaN or infinite


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 do nothing.

    Raises UsageError for a value that transformers would refuse.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, holds, wanted in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}: expected {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def arguments(self) -> dict:
        """The same as keywords of `model.generate`."""
        common = {"do_sample": not self.greedy, "repetition_penalty": self.repetition_penalty}
        if self.greedy:
            return common
        chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {**common, **chosen, "min_p": self.min_p or None}


def scores(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    """logits [B, V] float32 -> the same with -inf where a token is filtered out; seen [B, V] bool: tokens so far."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        weakest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        dropped = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def pick(
    logits: torch.Tensor,
    sampling: Sampling,
    seen: torch.Tensor | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> torch.Tensor:
    """logits [B, V] float32 -> tokens [B], NO_TOKEN where the logits of a row are no numbers. generator: one for all,
    or one for each row, which then gets what it would get alone."""
    filtered = scores(logits, sampling, seen)
    if sampling.greedy:
        tokens = filtered.argmax(-1)
    else:
        # what torch.multinomial does for one draw, less its check, for which the host would wait
        probabilities = filtered.softmax(-1)
        noise = torch.empty_like(probabilities)
        if isinstance(generator, Sequence):
            for row, own in zip(noise, generator, strict=True):
                row.exponential_(generator=own)
        else:
            noise.exponential_(generator=generator)
        tokens = (probabilities / noise).argmax(-1)
    return tokens.where(logits.amax(-1).isfinite(), NO_TOKEN)
