"""Whether the loop runs a model: by what the model says of itself, by a trial, by its first prompt, and by length."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lowbit.errors import first_line
from lowbit.generation.positions import PositionTables
from lowbit.generation.request import Request
from lowbit.generation.steps.runner import StepRunner
from lowbit.generation.trial import needs_trial, trial_failure
from lowbit.transformers_api import cache_argument
from lowbit.upstream import MissingNameError

# What a model raises that does not get along with a static cache
_CACHE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
# Settings of a generation config that change logits, and the values with which they do not
_OTHER_PROCESSORS: dict[str, tuple] = {
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


def refuse(model: PreTrainedModel) -> Refusal | None:
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


class Eligibility:
    """What is known of a model, from one run to the next.

    refusal: why the loop never runs it, once that is known.
    positions: what encodes its positions, seen once `has_run`: a first chunk of a prompt.
    """

    def __init__(self, model: PreTrainedModel, refusal: Refusal | None):
        self.model, self.refusal = model, refusal
        self.has_run, self.positions = False, PositionTables()

    def rule_out(self, reason: str, by_nature: bool = False) -> Refusal:
        self.refusal = Refusal(reason, by_nature)
        return self.refusal

    @contextmanager
    def judging(self) -> Iterator[None]:
        """What the model raises inside rules it out, unless it has run before or memory is short."""
        has_run = self.has_run
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except MissingNameError as error:
            self.rule_out(str(error))
        except _CACHE_ERRORS as error:
            if has_run:
                raise
            self.rule_out(f"a static cache does not work for it: {first_line(error)}")

    def observe(self, runner: StepRunner, request: Request) -> torch.Tensor | None:
        """Run the first chunk of the first prompt. Returns the logits [B, V] after it, None if it rules the model out.

        Only running a model tells whether it fills the cache, and which of its modules encode positions.
        """
        if needs_trial(self.model) and (failure := trial_failure(self.model, runner.make_cache)) is not None:
            self.rule_out(failure, by_nature=True)
            return None
        positions, end = PositionTables(), min(request.chunk, request.prompt_length)
        runner.restart(request, 0)
        with positions.watching(self.model):
            logits = runner.prefill(request, 0, end)
        if runner.cache.filled() != end:
            self.rule_out("its forward does not fill the cache that it is given", by_nature=True)
            return None
        self.has_run, self.positions = True, positions
        return logits

    def encodes_by_length(self, request: Request) -> bool:
        """Whether the first positions of a sequence as long as this may get are encoded otherwise than those of a short
        one. Then the prompt is run as `model.generate` does: anew and at once."""
        return not self.positions.same(2, request.length)

    def length_refusal(self, request: Request) -> Refusal | None:
        """Why a run is left to `model.generate` in which the encoding of the prompt would change: a model may start
        over there."""
        if self.positions.same(request.prompt_length, request.length):
            return None
        return Refusal(f"its encoding of positions changes between {request.prompt_length} and {request.length} tokens")
