"""Answers of lowbit's own loop, made in a thread of their own, as the server of transformers asks for them: text in a
queue as it comes, or all of it at once."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from lowbit.errors import LowbitError, first_line
from lowbit.generation.slots import End, Job, Scheduler, Slots
from lowbit.generation.text import TextStream
from lowbit.hf import check_vocabulary
from lowbit.options import TokenOptions
from lowbit.options.serving import LimitOptions
from lowbit.server.asked import ASKED, Asked, RequestError
from lowbit.server.together import Together
from lowbit.transformers_serving import events, parses_answers, stream_error


class AnswerStream:
    """The text of one answer, from its tokens, for whoever reads `queue` in the event loop `loop`.

    parser: finds calls of tools and reasoning in the text, None to hand it out as it is.
    """

    def __init__(self, asked: Asked, tokenizer, loop: asyncio.AbstractEventLoop, parser=None):
        self.asked, self.loop, self.parser = asked, loop, parser
        self.queue: asyncio.Queue = asyncio.Queue()
        self.total_tokens = 0
        self._text = TextStream(tokenizer, asked.stop, self._hand_out, special=parser is not None)
        if parser is not None:
            self._enqueue(events(parser, ""))

    def put(self, token: int) -> bool:
        """Returns whether no more is wanted: a stop string has come up, or the client has gone."""
        self.total_tokens += 1
        return self._text.put(token) or self.asked.cancelled.is_set()

    def end(self) -> None:
        self._text.finish()
        if self.parser is not None:
            self._enqueue(events(self.parser))
        self._enqueue([None])

    def fail(self, error: BaseException | str) -> None:
        self._enqueue([stream_error(error if isinstance(error, str) else first_line(error))])

    def cancel(self) -> None:
        self.asked.cancelled.set()

    def _hand_out(self, text: str) -> None:
        self._enqueue([text] if self.parser is None else events(self.parser, text))

    def _enqueue(self, items: list) -> None:
        for item in items:
            in_loop(self.loop, self.queue.put_nowait, item)


class WholeAnswer:
    """All of an answer at once: its text, and the ids that make it up to where it stops."""

    def __init__(self, asked: Asked, model, tokenizer):
        self.asked, self.model, self.tokenizer = asked, model, tokenizer
        self.ids: list[int] = []
        self._text = TextStream(tokenizer, asked.stop)

    def put(self, token: int) -> bool:
        self.ids.append(token)
        return self._text.put(token) or self.asked.cancelled.is_set()

    def result(self) -> tuple[str, list[int]]:
        """transformers counts the ids. Where the answers of a model are parsed, it takes their text from them too."""
        self._text.finish()
        text, ids = self._text.text, self.ids
        if self._text.stopped and parses_answers(self.tokenizer, self.model):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, ids


def token_options(asked: Asked, config, prompt_tokens: int, limit: int | None, limits: LimitOptions) -> TokenOptions:
    """How the tokens of an answer are chosen: as the request says, or else the `generation_config` of the model, whose
    max_new_tokens becomes that of the answer: transformers tells by it whether an answer was cut off.

    limit: tokens that the model takes. Raises RequestError for more than there is room for.
    """
    bounds = [each for each in (limit, limits.context) if each is not None]
    room = min(bounds) - prompt_tokens if bounds else limits.max_tokens
    wanted = asked.tokens.get("max_new_tokens")
    if not prompt_tokens:
        raise RequestError("the prompt is empty: expected some text")
    if room < 1 or (wanted or 1) > room:
        raise RequestError(
            f"{prompt_tokens} prompt tokens and {wanted or 1} new ones exceed the context of {min(bounds)}: "
            "shorten the prompt, or ask for fewer", code="context_length_exceeded",
        )  # fmt: skip
    if wanted is not None and wanted > limits.max_tokens:
        raise RequestError(f"{wanted} tokens are more than the {limits.max_tokens} of an answer here", "max_tokens")
    chosen = {name: getattr(config, name, None) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    chosen["temperature"] = (config.temperature or 1.0) if config.do_sample else 0.0
    given = {name: value for name, value in (chosen | asked.tokens).items() if value is not None}
    options = TokenOptions(**{**given, "max_new_tokens": wanted or min(room, limits.max_tokens)})
    config.max_new_tokens = options.max_new_tokens
    return options


class LoopAnswers:
    """Answers of a `Session`, in the order in which they are asked for: together in slots, or one at a time without."""

    def __init__(self, session, limits: LimitOptions, prefill_chunk: int, slots: Slots | None = None):
        self.session, self.limits, self.prefill_chunk, self.slots = session, limits, prefill_chunk, slots
        self._scheduler = Scheduler(slots, prefill_chunk, "lowbit-answers")
        self.together = Together(session, lambda alone: self._scheduler.submit(Job(alone)))

    def init_cb(self, model, gen_config) -> None:
        """Nothing is to be made ready."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        asked, ids, options = self._checked(inputs, gen_config)
        stream = AnswerStream(asked, self.session.tokenizer, asyncio.get_running_loop(), response_parser)
        self._submit(asked, ids, options, stream.put, lambda error: stream.fail(error) if error else stream.end())
        return stream.queue, stream

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        asked, ids, options = self._checked(inputs, gen_config)
        answer = WholeAnswer(asked, self.session.model, self.session.tokenizer)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        failure: list[Exception] = []

        def end(error: Exception | None) -> None:
            failure.extend([error] if error else [])
            in_loop(loop, ended.set)

        self._submit(asked, ids, options, answer.put, end)
        await ended.wait()
        if failure:
            raise failure[0]
        text, made = answer.result()
        return text, ids.shape[1], made

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        for job in self._scheduler.close():
            job.end(RequestError("the server ends", status=503))

    def end(self) -> None:
        """Once nothing runs any more. Raises what has ended the server, if anything did."""
        self.stop()
        self._scheduler.join()
        self.together.end()
        if self.together.lost is not None:
            raise self.together.lost

    def _checked(self, inputs, config) -> tuple[Asked, torch.Tensor, TokenOptions]:
        asked, ids = ASKED.get(), inputs["input_ids"]
        options = token_options(asked, config, ids.shape[1], self.session.context_length, self.limits)
        check_vocabulary(self.session.model, ids)
        return asked, ids, options

    def _submit(
        self, asked: Asked, ids: torch.Tensor, options: TokenOptions, put: Callable[[int], bool], end: End
    ) -> None:
        """put(token) -> whether no more is wanted; end(what went wrong, if anything) once, at last."""

        def on_token(made: list[int]) -> bool:
            return put(made[0])

        def alone() -> None:
            self.together.generate(ids, on_token, **vars(options), prefill_chunk=self.prefill_chunk)

        request = None if self.slots is None else self.slots.request(ids, options, self.prefill_chunk)
        self._scheduler.submit(Job(alone, end, lambda: not asked.cancelled.is_set(), request, on_token))


def in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    """Call something in an event loop of another thread; nothing where the loop has ended, and with it who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


class Processor:
    """A tokenizer whose chat template is bounded, and refuses with a `LowbitError` what it does not take."""

    def __init__(self, tokenizer, encode_chat: Callable[..., list[int]]):
        self._tokenizer_given, self._encode_chat = tokenizer, encode_chat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer_given, name)

    def __call__(self, *args, **given):
        return self._tokenizer_given(*args, **given)

    def apply_chat_template(self, messages: list[dict], *, tools=None, **given):
        """As transformers' handlers call it: {"input_ids": [1, T]}."""
        from transformers import BatchEncoding

        template = self._tokenizer_given.chat_template
        if template is None:
            raise RequestError("the tokenizer of this model has no chat template: use /v1/completions", "messages")
        if tools and "tools" not in str(template):
            raise RequestError("the chat template of this model takes no tools", "tools")
        values = {name: value for name, value in given.items() if name not in _OF_TENSORS}
        try:
            ids = self._encode_chat(
                self._tokenizer_given, messages, "these messages", threads=True, tools=tools, **values
            )
        except LowbitError as error:
            raise RequestError(str(error), "messages") from None
        return BatchEncoding({"input_ids": torch.tensor([ids], dtype=torch.long)})


# What transformers' handlers ask of the result, which is always the same here
_OF_TENSORS = {"tokenize", "return_tensors", "return_dict", "load_audio_from_video"}
