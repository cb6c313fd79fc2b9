"""The loops that a model is measured in. Each takes a model and gives `run(ids, new_tokens) -> Timing`.

They go on after an end token, so that every run makes as many tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import BaseStreamer

from lowbit.generation import Decoder

# A token that no model has
_NEVER = -1


@dataclass(frozen=True)
class Timing:
    """Of a run over `batch` prompts of `prompt_tokens` each: seconds until each had its first token, and of the `steps`
    after that, which give `batch` tokens each. path: what ran the steps."""

    batch: int
    prompt_tokens: int
    first_seconds: float
    steps: int
    decode_seconds: float
    path: str

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch * self.steps / self.decode_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.prompt_tokens / self.first_seconds

    @property
    def step_seconds(self) -> float:
        return self.decode_seconds / self.steps


Run = Callable[[torch.Tensor, int], Timing]


def lowbit_loop(model) -> Run:
    """`lowbit.generation.Decoder`: a static cache, and on a GPU a captured step."""
    decoder = Decoder(model)

    def run(ids: torch.Tensor, new_tokens: int) -> Timing:
        # in one piece, as `model.generate` runs it
        stats = decoder.generate(ids, max_new_tokens=new_tokens, eos_token_id=(), prefill_chunk=None).stats
        return Timing(*ids.shape, stats.prefill_seconds, new_tokens - 1, stats.decode_seconds, stats.path)

    return run


def transformers_loop(model) -> Run:
    """`model.generate`, greedy, with its defaults."""

    def run(ids: torch.Tensor, new_tokens: int) -> Timing:
        clock, started = _Clock(), time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=_NEVER,
                pad_token_id=0,
                streamer=clock,
            )
        _, first, *_, last = clock.seconds  # the prompt comes first
        return Timing(*ids.shape, first - started, new_tokens - 1, last - first, "model.generate")

    return run


LOOPS = {"lowbit": lowbit_loop, "generate": transformers_loop}


class _Clock(BaseStreamer):
    """When the tokens of each step had arrived."""

    def __init__(self):
        self.seconds: list[float] = []

    def put(self, value):
        self.seconds.append(time.perf_counter())

    def end(self):
        pass


def prompts(vocabulary: int, batch: int, tokens: int, number: int, device) -> torch.Tensor:
    """Random ids [batch, tokens]. Those of another `number` differ from the first token on, so that no cache of
    prompts holds any of them."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, vocabulary, (batch, tokens), generator=generator)
    ids[:, 0] = 3 + number % (vocabulary - 3)
    return ids.to(device)
