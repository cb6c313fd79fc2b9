"""Answers of transformers' continuous batching: requests share forward passes, and join and leave between them."""

import asyncio
from itertools import count
from typing import Any

from lowbit.errors import InputError, first_line
from lowbit.generation.eligibility import refuse
from lowbit.hf import check_vocabulary
from lowbit.options import TokenOptions
from lowbit.options.serving import BatchingOptions, LimitOptions
from lowbit.parallel import ranks_of
from lowbit.server.answers import AnswerStream, WholeAnswer, token_options
from lowbit.server.asked import ASKED, Asked, RequestError
from lowbit.transformers_serving import fatal_error, page_size, start_batching, submit

_SIZES = {"cb_block_size": "block_size", "cb_num_blocks": "num_blocks", "cb_max_batch_tokens": "max_batch_tokens",
          "cb_max_memory_percent": "max_memory_percent"}  # fmt: skip
# What one batch has for all of its rows -> the value with which it does nothing
_OF_THE_BATCH = {"seed": None, "min_p": 0.0, "repetition_penalty": 1.0}
_TOKENS_ON_CPU = 65_536  # of all requests together, where no option says how many
_PER_REQUEST = ("temperature", "top_k", "top_p")


class BatchedAnswers:
    """Answers of a `Session`'s model, many at a time."""

    def __init__(self, session, limits: LimitOptions, batching: BatchingOptions):
        """Raises InputError for a model that does not run so, or would not give the same."""
        model = session.model
        if ranks_of(model) is not None:
            raise InputError("continuous batching runs a model in one process: leave one of it and --tp-plan out")
        if not hasattr(model, "init_continuous_batching"):
            raise InputError(f"{type(model).__name__} has no continuous batching: leave --continuous-batching out")
        if (refusal := refuse(model)) is not None:
            raise InputError(f"continuous batching does not do what this model needs: {refusal.reason}")
        given = {field: getattr(batching, name) for name, field in _SIZES.items()}
        sizes = {field: size for field, size in given.items() if size is not None}
        page = page_size(sizes)
        if model.device.type == "cpu" and not sizes.keys() & {"num_blocks", "max_memory_percent"}:
            sizes["num_blocks"] = -(-_TOKENS_ON_CPU // page)  # transformers would take most of the memory
        self.session, self.limits = session, limits
        limit, room = session.context_length, sizes.get("num_blocks")
        bounds = [limit, None if room is None else room * page]  # more than its cache holds would wait forever
        self.context_length = min((each for each in bounds if each is not None), default=None)
        self._batching = start_batching(model, _sampling_all(model), sizes)
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
        answer = WholeAnswer(asked, self.session.model, self.session.tokenizer)
        ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

        def end(error: str | None = None) -> None:
            if not ended.done():  # where the server ends meanwhile
                ended.set_result(error)

        self._submit(asked, ids, options, answer.put, end, end)
        if (error := await ended) is not None:
            raise RequestError(error, status=500)
        text, made = answer.result()
        return text, len(ids), made

    def is_alive(self) -> bool:
        return fatal_error(self._batching) is None

    def stop(self) -> None:
        self._batching.stop(block=True, timeout=5)

    def end(self) -> None:
        """Nothing is left to be done."""

    def _checked(self, inputs, config) -> tuple[Asked, list[int], TokenOptions]:
        asked, ids = ASKED.get(), inputs["input_ids"]
        if (error := fatal_error(self._batching)) is not None:
            raise RequestError(f"continuous batching has ended: {error}", status=503)
        options = token_options(asked, config, ids.shape[1], self.context_length, self.limits)
        for name, neutral in _OF_THE_BATCH.items():
            if (value := getattr(options, name)) != neutral:
                whose = "the request" if name in asked.tokens else "the model's generation_config"
                instead = "leave it out" if neutral is None else f"send {neutral}"
                words = f"{name} is {value} by {whose}: --continuous-batching has one for all requests, {instead}"
                raise RequestError(words, name)
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
            try:
                stopped = any(put(token) for token in new)  # up to the first that ends it
            except Exception as failure:  # of what parses the text
                stopped, error = True, first_line(failure)
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
