"""What the loop does not run is left to `model.generate`, with the same parameters."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lowbit.errors import InputError
from lowbit.generation.answer import BAD_LOGITS, Answer
from lowbit.generation.eligibility import Refusal
from lowbit.generation.request import Request
from lowbit.generation.steps.notices import say_once


class _TakeTokens(StoppingCriteria):
    """Hands each step's tokens to an answer; stops all rows once it has ended."""

    def __init__(self, answer: Answer):
        self.answer = answer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        stop = self.answer.take(input_ids[:, -1].tolist())
        return torch.full((len(input_ids),), stop, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Raises InputError for logits that are NaN or infinite: greedy search would take them for a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(-1).isfinite().all()):  # -inf alone masks a token
            raise InputError(BAD_LOGITS)
        return scores


def model_generate(model: PreTrainedModel, request: Request, stopping: StoppingCriteria, **more: Any) -> None:
    """`model.generate` with the same parameters, and `more` of its own. A seed leaves the global random state as it
    was. Raises InputError for logits that are no numbers."""
    settings = request.settings
    with torch.random.fork_rng(enabled=request.seed is not None):
        if request.seed is not None:
            torch.manual_seed(request.seed)
        cast(GenerationMixin, model).generate(
            input_ids=request.ids,
            attention_mask=request.mask,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(settings.eos) or None,
            pad_token_id=settings.pad,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([stopping]),
            **settings.sampling.arguments(),
            **more,
        )


def generate_plainly(model: PreTrainedModel, request: Request, answer: Answer) -> None:
    model_generate(model, request, _TakeTokens(answer))


class Fallback:
    """Generation by transformers, where the loop does not run a model or a request.

    generate: (model, request, answer) -> None, `generate_plainly` or that of a draft.
    int8_cache: the caller wants keys and values in int8, which transformers' own cache has not.
    cache_given: the caller has given a cache, so that it is worth a warning to do without.
    """

    path = "model.generate"

    def __init__(
        self,
        model: PreTrainedModel,
        generate: Callable[[PreTrainedModel, Request, Answer], None],
        *,
        int8_cache: bool,
        cache_given: bool,
    ):
        self.model, self.generate = model, generate
        self.int8_cache, self.cache_given = int8_cache, cache_given

    def run(self, request: Request, answer: Answer, refusal: Refusal) -> None:
        """Raises InputError where there is none: with an int8 cache."""
        if self.int8_cache:
            raise InputError(
                f"keys and values in int8 need a cache that this model does not run with: {refusal.reason}"
            )
        without = ", without the cache that was asked for" if self.cache_given else ""
        level = logging.INFO if refusal.by_nature and not self.cache_given else logging.WARNING
        say_once(f"{type(self.model).__name__} runs in {self.path}{without}: {refusal.reason}", level)
        try:
            self.generate(self.model, request, answer)
        finally:
            answer.metrics.end_decode()
