"""How many tokens per second a server makes for so many requests at once: its answers without HTTP."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from lowbit.errors import InputError
from lowbit.generation.loop import PREFILL_CHUNK
from lowbit.generation.slots import refuse_slots
from lowbit.generation.stream import Session
from lowbit.options import BatchingOptions, LimitOptions
from lowbit.server.asked import ASKED, Asked
from lowbit.server.run import answers_of

ONE_BY_ONE, SLOTS, TOGETHER = "one after the other", "slots", "continuous batching"
_TOKENS_IN_A_PASS = 512


@dataclass(frozen=True)
class Rate:
    """requests at once were answered, `tokens_per_second` for all of them together; seconds: for the last of them."""

    how: str
    requests: int
    tokens_per_second: float
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


class _Letters:
    """A tokenizer of no consequence: what is measured is the making of tokens."""

    def decode(self, ids, **options) -> str:
        return "x" * len(ids)

    def __call__(self, text: str, **options) -> dict:
        return {"input_ids": [0] * len(text)}


def measure(
    model: PreTrainedModel,
    requests: Iterable[int],
    prompt_tokens: int,
    new_tokens: int,
    on_rate: Callable[[Rate], None] = lambda rate: None,
) -> tuple[list[Rate], dict[str, str]]:
    """The rates of a loaded model for each number of requests: answered one after the other, in slots, and batched by
    transformers.

    Args:
        prompt_tokens, new_tokens: Of each request; each has another prompt.
        on_rate: Called with each rate.

    Returns:
        The rates, and the ways in which the model is not run, with the reason.
    """
    session, rates, left_out = Session(model, _Letters()), [], {}
    blocks = -(-max(requests) * (prompt_tokens + new_tokens) // 32) + max(requests)  # of 32 tokens, or more
    for how, batching in {
        ONE_BY_ONE: BatchingOptions(slots=0),
        SLOTS: BatchingOptions(),
        TOGETHER: BatchingOptions(
            continuous_batching=True, cb_num_blocks=blocks, cb_max_batch_tokens=_TOKENS_IN_A_PASS
        ),
    }.items():
        try:
            if how == SLOTS and (refusal := refuse_slots(session.decoder)) is not None:
                raise InputError(refusal.reason)
            answers = answers_of(session, LimitOptions(), batching, PREFILL_CHUNK)
        except InputError as error:
            left_out[how] = str(error)
            continue
        for count in requests:  # first what is made once, for so many
            asyncio.run(_seconds(answers, model, count, prompt_tokens, min(new_tokens, 4)))
            took = asyncio.run(_seconds(answers, model, count, prompt_tokens, new_tokens))
            rates.append(Rate(how, count, count * new_tokens / took, took))
            on_rate(rates[-1])
        answers.stop()
        answers.end()
    return rates, left_out


async def _seconds(answers, model: PreTrainedModel, requests: int, prompt_tokens: int, new_tokens: int) -> float:
    """From when so many requests come, together, to the end of the last answer."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]  # models of text have one

    async def ask(number: int) -> None:
        ASKED.set(Asked({"max_new_tokens": new_tokens, "temperature": 0.0}))
        ids = (torch.arange(prompt_tokens) + 7 * number).view(1, -1) % (vocabulary - 1) + 1
        config = GenerationConfig(eos_token_id=None)
        queue, _ = answers.generate_streaming(model, None, {"input_ids": ids}, config, str(number))
        while (item := await queue.get()) is not None:
            if not isinstance(item, str):
                raise InputError(f"an answer failed: {item.msg}")

    start = time.perf_counter()
    await asyncio.gather(*(asyncio.create_task(ask(number)) for number in range(requests)))
    return time.perf_counter() - start
