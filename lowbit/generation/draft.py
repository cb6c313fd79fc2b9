"""Drafts: tokens that something cheap proposes and the model checks, several in one step, in transformers' assisted
generation."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation import BaseStreamer, GenerationMode

from lowbit.errors import InputError, UsageError, first_line
from lowbit.generation.answer import Answer
from lowbit.generation.fallback import model_generate
from lowbit.generation.request import Request
from lowbit.transformers_api import is_stateful

_ONE_AFTER_THE_OTHER = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass(frozen=True)
class Draft:
    """The draft source of speculative decoding.

    Attributes:
        assistant: A smaller model with the same tokenizer.
        lookup: Prompt lookup instead: up to so many tokens that followed the last earlier occurrence of the current
            n-gram.

    Raises:
        UsageError: Unless exactly one of both is given.
    """

    assistant: PreTrainedModel | None = None
    lookup: int | None = None

    def __post_init__(self):
        if (self.assistant is None) == (self.lookup is None):
            raise UsageError("either an assistant drafts or a prompt lookup: expected one of them")
        if self.lookup is not None and self.lookup < 1:
            raise UsageError(f"the prompt lookup is of {self.lookup} tokens: expected 1 or more")

    def __str__(self) -> str:
        return "drafts come from the text so far" if self.assistant is None else "drafts come from an assistant"

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError where transformers would refuse, or generate without a draft and say nothing; UsageError
        for a model that is its own assistant, whose passes would count twice."""
        if self.assistant is model:
            raise UsageError("the assistant is the model itself: expected a cheaper one")
        for each in (model, self.assistant):
            if each is not None and is_stateful(each):
                raise InputError(f"{type(each).__name__} keeps a state that cannot be taken back: no drafts with it")
        mode = model.generation_config.get_generation_mode()
        if mode not in _ONE_AFTER_THE_OTHER:
            raise InputError(f"the generation_config asks for {mode.value}: transformers checks no drafts in it")
        if self.assistant is not None:
            check_same_tokens(model.config, self.assistant.config)

    def context_length(self, limit: int | None) -> int | None:
        """That of a model with this one: an assistant may have less, and a lookup proposes tokens past the end."""
        if self.assistant is not None:
            own = getattr(self.assistant.config.get_text_config(), "max_position_embeddings", None)
            return min((each for each in (limit, own) if each is not None), default=None)
        return None if limit is None else max(0, limit - (self.lookup or 0))

    def generate(self, model: PreTrainedModel, request: Request, answer: Answer) -> None:
        """`model_generate` of a prompt of one row with these drafts, which the metrics of the answer count."""
        listener = _CheckedTokens(1 if model.config.is_encoder_decoder else request.prompt_length, answer)
        drafts = {"assistant_model": self.assistant, "prompt_lookup_num_tokens": self.lookup}
        hook = model.register_forward_pre_hook(listener.count_drafted, with_kwargs=True)
        try:
            model_generate(model, request, listener, streamer=listener, **drafts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # transformers 5.17 with a sliding window
            raise InputError(
                f"transformers {transformers.__version__} cannot check drafts of {type(model).__name__}: "
                f"{first_line(error)}: generate without drafts, or install another release"
            ) from error
        finally:
            hook.remove()


def check_same_tokens(config, assistant) -> None:
    """Raises InputError if an assistant of this config cannot draft for a model of that one."""
    if config.is_encoder_decoder != assistant.is_encoder_decoder:
        raise InputError("of model and assistant one is an encoder-decoder: expected both or neither")
    sizes = [each.get_text_config(decoder=True).vocab_size for each in (config, assistant)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the assistant has a vocabulary of {sizes[1]}, the model one of {sizes[0]}: expected the same tokens"
        )


class _CheckedTokens(BaseStreamer, StoppingCriteria):
    """Hands each checked token to an answer, and stops once it has ended. A pass of the model takes the drafted tokens,
    and the one before them that is not in the cache yet (the first pass: all of the prompt, `start` tokens), and gives
    those that it accepts and one more.

    As a streamer it sees checked tokens only; as a stopping criterion it may be asked about drafted ones too.
    """

    def __init__(self, start: int, answer: Answer):
        self.answer, self.counts, self.known = answer, answer.metrics.drafts, start
        self.checks = -1  # the prompt is streamed first
        self.stop = False

    def count_drafted(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        fed = kwargs["decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"]
        self.counts.drafted += fed.shape[1] - self.known
        self.known = 1

    def put(self, value: torch.Tensor) -> None:
        self.checks += 1
        if not self.checks:
            return
        tokens = value.flatten().tolist()
        self.counts.accepted += len(tokens) - 1
        if self.checks == 1:
            self.counts.early = len(tokens) - 1
        self.stop = self.stop or any(self.answer.take([token]) for token in tokens)

    def end(self) -> None:
        """Nothing is kept back."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), self.stop, device=input_ids.device)
