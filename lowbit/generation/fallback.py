"""Which models the loop leaves to `model.generate`, and that path."""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lowbit.errors import InputError
from lowbit.generation.answer import BAD_LOGITS
from lowbit.transformers_api import attention_of, cache_argument, supports_static_cache
from lowbit.upstream import MissingNameError

logger = logging.getLogger("lowbit")

_ATTENTION = ("sdpa", "eager")  # those that take the mask of a cache that is longer than what it holds
# Settings of a generation config that change logits, and the values with which they do not
_OTHER_PROCESSORS = {
    "guidance_scale": (1, 1.0), "sequence_bias": (), "no_repeat_ngram_size": (0,), "bad_words_ids": (),
    "min_length": (0,), "min_new_tokens": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "remove_invalid_values": (False,), "exponential_decay_length_penalty": (), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "top_h": (), "watermarking_config": (), "renormalize_logits": (False,), "num_beams": (1,),
    "num_return_sequences": (1,), "penalty_alpha": (0.0,), "dola_layers": (),
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why the loop leaves a model to `model.generate`. by_nature: the model is of a kind that the loop is not made for;
    anything else is worth a warning."""

    reason: str
    by_nature: bool = False


def refuse(model) -> Refusal | None:
    """Why the loop cannot run a model, as far as it can be told without running it; None if it can."""
    if model.config.is_encoder_decoder:
        return Refusal("it is an encoder-decoder", by_nature=True)
    if cache_argument(model) is None:
        return Refusal("its forward takes no key-value cache", by_nature=True)
    for name, neutral in _OTHER_PROCESSORS.items():
        value = getattr(model.generation_config, name, None)
        if value is not None and value not in neutral:
            return Refusal(f"its generation_config asks for {name}")
    return None


def needs_trial(model) -> bool:
    """Whether nothing says that a model and its attention run with a static cache, so that it has to be tried."""
    try:
        attention = attention_of(model.config.get_text_config(decoder=True))
        return attention not in _ATTENTION or not supports_static_cache(model)
    except MissingNameError as error:
        say_once(f"every model is tried on a few tokens before its first: {error}", logging.WARNING)
        return True


@cache
def say_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)


class Listener(StoppingCriteria):
    """Hands each new token to a function; stops all rows if it says so."""

    def __init__(self, on_token):
        self.on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        stop = self.on_token(input_ids[:, -1].tolist())
        return torch.full((len(input_ids),), bool(stop), device=input_ids.device)


class _Finite(LogitsProcessor):
    """Raises InputError for logits that are NaN or infinite: greedy search would take them for a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(-1).isfinite().all()):  # -inf alone masks a token
            raise InputError(BAD_LOGITS)
        return scores


def model_generate(
    model, ids, mask, *, max_new_tokens: int, sampling, eos, pad: int, seed: int | None, listener, **more
) -> None:
    """`model.generate` with the same parameters, and `more` of its own. A seed leaves the global random state as it
    was. Raises InputError for logits that are no numbers."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(eos) or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([listener]),
            **sampling.arguments(),
            **more,
        )
