"""Whether a model gives with the loop's cache what it gives without any, tried on a few tokens."""

import logging
from collections.abc import Callable, Iterator
from typing import cast

import torch
from transformers import Cache, PreTrainedModel

from lowbit.errors import first_line
from lowbit.generation.request import TokenSettings
from lowbit.generation.sampling import Sampling
from lowbit.generation.steps.cache import has_sliding_window, room
from lowbit.generation.steps.notices import say_once
from lowbit.generation.steps.step import Step
from lowbit.transformers_api import attention_of, supports_static_cache
from lowbit.upstream import MissingNameError

_ATTENTION = ("sdpa", "eager")  # those that take the mask of a cache that is longer than what it holds
_ROWS = 2
_PROMPT, _CHUNK, _PADDING = 5, 3, 2
_STEPS = 2  # with the cache as it is called, and as many as it is recorded
# Rounding of bfloat16 through the layers gives a relative error of about 0.01, a wrong mask or position 0.1 to 1
_LARGEST_ERROR = 0.05


def needs_trial(model: PreTrainedModel) -> bool:
    """Whether nothing says that a model and its attention run with a static cache, so that it has to be tried."""
    try:
        attention = attention_of(model.config.get_text_config(decoder=True))
        return attention not in _ATTENTION or not supports_static_cache(model)
    except MissingNameError as error:
        say_once(f"every model is tried on a few tokens before its first: {error}", logging.WARNING)
        return True


def trial_failure(model: PreTrainedModel, make_cache: Callable[[PreTrainedModel, int, int], Cache]) -> str | None:
    """Why a model that says nothing of static caches does not run with one, None if it does."""
    length = room(1)
    cache = make_cache(model, _ROWS, length)
    if has_sliding_window(cache):
        return "nothing says that it masks what a static cache keeps beyond its window"
    return _difference(model, Step(model, cache, _ROWS, length, TokenSettings(Sampling(), eos=(), pad=0)))


def _difference(model: PreTrainedModel, step: Step) -> str | None:
    """What is wrong with the logits of a fresh `Step` of two rows, None if they are those of the model alone: for a
    prompt in two chunks, one row of it padded, and for steps after it."""
    length = _PROMPT + 2 * _STEPS
    vocabulary = cast(int, model.get_input_embeddings().num_embeddings)
    ids = torch.arange(_ROWS * length, device=model.device).view(_ROWS, length) * 7 % max(vocabulary // 2, 1) + 1
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    try:
        arguments = step.arguments(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), None, last_only=False)
        expected = model(**arguments | {"use_cache": False}).logits.float()
        for position, logits in _steps(step, ids, mask):
            error = (logits - expected[:, position]).norm() / expected[:, position].norm()
            if not error < _LARGEST_ERROR:
                return f"with a static cache its logits are others: {error:.0%} off in a trial"
    except Exception as error:  # code of the model's authors
        return f"a static cache does not work for it: {first_line(error)}"
    return None


def _steps(step: Step, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (position, the logits [2, V] after it)."""
    step.begin(ids[:, :_PROMPT], mask[:, :_PROMPT], seed=0)
    step.prefill(0, _CHUNK)
    yield _PROMPT - 1, step.prefill(_CHUNK, _PROMPT)
    for position in range(_PROMPT, ids.shape[1]):
        if position == _PROMPT + _STEPS:
            step.set_visible(step.length)
        step.feed(ids[:, position : position + 1])
        yield position, step.logits()
