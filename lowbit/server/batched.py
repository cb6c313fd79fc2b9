"""Answers of transformers' continuous batching: requests share forward passes, and join and leave between them."""

import asyncio
from itertools import count
from typing import Any

from lowbit.errors import InputError
from lowbit.hf import check_vocabulary
from lowbit.options import TokenOptions
from lowbit.options.serving import BatchingOptions, LimitOptions
from lowbit.server.answers import AnswerStream, WholeAnswer, token_options
from lowbit.server.asked import ASKED, Asked, RequestError
from lowbit.transformers_serving import fatal_error, start_batching, submit

_SIZES = {"cb_block_size": "block_size", "cb_num_blocks": "num_blocks", "cb_max_batch_tokens": "max_batch_tokens",
          "cb_max_memory_percent": "max_memory_percent"}  # fmt: skip
# What one batch has for all of its rows -> the value with which it does nothing
_OF_THE_BATCH = {"seed": None, "min_p": 0.0, "repetition_penalty": 1.0}
_PER_REQUEST = ("temperature", "top_k", "top_p")


class BatchedAnswers:
    """Answers of a `Session`'s model, many at a time."""

    def __init__(self, session, limits: LimitOptions, batching: BatchingOptions):
        self.session, self.limits = session, limits
        sizes = {field: getattr(batching, name) for name, field in _SIZES.items()}
        if not hasattr(session.model, "init_continuous_batching"):
            raise InputError(f"{type(session.model).__name__} has no continuous batching: leave it out")
        self._batching = start_batching(
            session.model,
            _sampling_all(session.model),
            {name: size for name, size in sizes.items() if size is not None},
        )
        self._numbers = count()

    def init_cb(self, model, gen_config) -> None:
        """It runs since the server began, with a config that leaves all to the requests."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        asked, ids, options = self._checked(inputs, gen_config)
        stream = AnswerStream(asked, self.session.tokenizer, asyncio.get_running_loop(), response_parser)
        self._submit(asked, ids, options, stream.put, stream.end, stream.fail)
        return stream.queue, stream

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        asked, ids, options = self._checked(inputs, gen_config)
        answer, ended = (
            WholeAnswer(asked, self.session.model, self.session.tokenizer),
            asyncio.get_running_loop().create_future(),
        )

        def fail(words: str) -> None:
            ended.set_exception(InputError(words))

        self._submit(asked, ids, options, answer.put, lambda: ended.set_result(None), fail)
        await ended
        text, made = answer.result()
        return text, len(ids), made

    def is_alive(self) -> bool:
        return fatal_error(self._batching) is None

    def stop(self) -> None:
        self._batching.stop(block=True, timeout=5)

    def _checked(self, inputs, config) -> tuple[Asked, list[int], TokenOptions]:
        asked, ids = ASKED.get(), inputs["input_ids"]
        if (error := fatal_error(self._batching)) is not None:
            raise RequestError(f"continuous batching has ended: {error}", status=503)
        options = token_options(asked, config, ids.shape[1], self.session.context_length, self.limits)
        for name, neutral in _OF_THE_BATCH.items():
            if getattr(options, name) != neutral:
                raise RequestError(f"{name} cannot be that of a request with --continuous-batching: leave it out", name)
        check_vocabulary(self.session.model, ids)
        return asked, ids[0].tolist(), options

    def _submit(self, asked: Asked, ids: list[int], options: TokenOptions, put, end, fail) -> None:
        """put(token) -> whether no more is wanted; end() or fail(words) once, at last."""
        request_id, taken, ended = f"request-{next(self._numbers)}", 0, False

        def on_tokens(tokens: list[int], finished: bool, error: str | None) -> None:
            nonlocal taken, ended
            if ended:
                return
            new, taken = tokens[taken:], len(tokens)
            stopped = any(put(token) for token in new)  # up to the first that ends it
            ended = finished or stopped or error is not None
            if stopped and not finished:
                self._batching.cancel_request(request_id)
            if error is not None:
                fail(error)
            elif ended:
                end()

        given: dict[str, Any] = {name: getattr(options, name) for name in _PER_REQUEST}
        given["top_k"] = options.top_k or _vocabulary(self.session.model)  # 0 would leave one token, not all
        if given["temperature"] == 0:
            given |= {"temperature": 1.0, "top_k": 1, "top_p": 1.0}  # greedy
        if not submit(self._batching, ids, request_id, on_tokens, max_new_tokens=options.max_new_tokens, **given):
            raise RequestError("the server takes no more requests", status=503)


def _sampling_all(model):
    """A config under which requests choose how they sample: transformers makes what it asks for, no more."""
    from copy import deepcopy

    config = deepcopy(model.generation_config)
    config.update(
        do_sample=True, temperature=0.999, top_k=_vocabulary(model), top_p=0.999
    )  # what does nothing is left out
    config.update(min_p=None, repetition_penalty=None, use_cache=False)
    return config


def _vocabulary(model) -> int:
    return model.get_input_embeddings().num_embeddings
