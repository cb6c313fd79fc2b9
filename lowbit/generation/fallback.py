"""Which models the loop leaves to `model.generate`, and that path."""

import inspect
import logging
from functools import cache

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lowbit.errors import InputError
from lowbit.generation.answer import BAD_LOGITS

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


def refuse(model) -> str | None:
    """Why the loop cannot run a model, as far as it says so itself; None if it can."""
    parameters = inspect.signature(model.forward).parameters
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    asked = [
        name
        for name, neutral in _OTHER_PROCESSORS.items()
        if (value := getattr(model.generation_config, name, None)) is not None and value not in neutral
    ]
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if model._is_stateful or "past_key_values" not in parameters:
        return "it keeps a state of its own, not a key-value cache"
    if not model._can_compile_fullgraph:
        return "transformers knows no static cache for it"
    if attention not in _ATTENTION:
        return f"its attention is {attention}; expected {' or '.join(_ATTENTION)}"
    if asked:
        return f"its generation_config asks for {asked[0]}"
    return None


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


def model_generate(
    model, ids, mask, *, max_new_tokens: int, sampling, eos, pad: int, seed: int | None, listener, **more
) -> None:
    """`model.generate` with the same parameters, and `more` of its own. A seed leaves the global random state as it
    was."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(eos) or None,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([listener]),
                **sampling.arguments(),
                **more,
            )
        except RuntimeError as error:  # of torch.multinomial
            if "nan" not in str(error):
                raise
            raise InputError(BAD_LOGITS) from None
