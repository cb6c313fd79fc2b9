"""What one request asks for, checked: the fields of its body, what they may be, and what the server does with them.

transformers' handlers get what they understand. What chooses tokens goes to lowbit's loop (`ASKED`), whose options are
those of each request; a field that nothing here obeys is refused, unless it says what happens anyway.
"""

import json
import math
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import InputError
from lowbit.server.messages import checked_input, checked_messages, checked_tools


class RequestError(InputError):
    """A request that is not answered. field: of its body; status: of HTTP; code: as OpenAI's API names it."""

    def __init__(self, words: str, field: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(words)
        self.field, self.status, self.code = field, status, code


@dataclass
class Asked:
    """tokens: options of lowbit's loop (`TokenOptions`) that the request gives. stop: where the answer ends.
    cancelled: the client has gone."""

    tokens: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)


ASKED: ContextVar[Asked] = ContextVar("asked")


# What values may be: each reads one, and raises ValueError with what is expected


def _number(low: float, high: float, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a number")
        if not math.isfinite(value) or not (low < value if above else low <= value) or value > high:
            raise ValueError(
                f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
            )
        return float(value)

    return read


def _count(least: int, most: int = 2**63 - 1) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a whole number from {least} on" if most == 2**63 - 1 else f"{least} to {most}")
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given) or len(given) > 16:
        raise ValueError("text that is not empty, or a list of at most 16 of them")
    return tuple(given)


def _template_values(value: Any) -> dict:
    """Names that a chat template reads; not those by which a whole template could be given, or the result changed."""
    if not isinstance(value, dict) or not all(isinstance(v, str | bool | int | float) for v in value.values()):
        raise ValueError("an object of texts, numbers, true and false")
    if taken := sorted(value.keys() & _NOT_OF_TEMPLATES):
        raise ValueError(f"no {taken[0]}, which is not the request's to choose")
    return value


_NOT_OF_TEMPLATES = {
    "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs", "load_audio_from_video", "num_frames", "messages", "tokenizer", "chat",
    "threads", "self",
}  # fmt: skip


def _only(*harmless: Any) -> Callable[[Any], Any]:
    """For what is not done here: values that change nothing."""

    def read(value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in harmless):
            shown = " or ".join(json.dumps(each) for each in harmless)
            raise ValueError(
                f"{shown}, or nothing: this server does no more" if harmless else "nothing: it is not done"
            )
        return value

    return read


def _any(value: Any) -> Any:
    return value


# Fields of all bodies. Those of the loop are its options by another name, perhaps
_TOKENS = {"temperature": _number(0, 100), "top_p": _number(0, 1, above=True), "seed": _count(0), "top_k": _count(0),
           "min_p": _number(0, 1), "repetition_penalty": _number(0, 100, above=True)}  # fmt: skip
_LENGTHS = {name: _count(1) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")}
_PENALTIES = {name: _only(0, 0.0) for name in ("frequency_penalty", "presence_penalty")}
_COMMON = {
    **_TOKENS, "model": _text, "stream": _flag, "user": _any, "metadata": _any, "store": _only(False),
    "service_tier": _any, "prompt_cache_key": _any, "safety_identifier": _any,
}  # fmt: skip
_CALLS = {"tools": checked_tools, "tool_choice": _only("auto", "none"), "parallel_tool_calls": _flag}
_FIELDS = {
    "/v1/chat/completions": {
        **_COMMON, **_PENALTIES, **_CALLS, "messages": checked_messages, "stop": _stop, "stream_options": _any,
        "max_tokens": _LENGTHS["max_tokens"], "max_completion_tokens": _LENGTHS["max_completion_tokens"],
        "n": _only(1), "logprobs": _only(False), "top_logprobs": _only(0), "logit_bias": _only({}),
        "response_format": _only({"type": "text"}), "modalities": _only(["text"]),
        "chat_template_kwargs": _template_values,
    },
    "/v1/completions": {
        **_COMMON, **_PENALTIES, "prompt": _text, "stop": _stop, "stream_options": _any, "n": _only(1),
        "max_tokens": _LENGTHS["max_tokens"], "best_of": _only(1), "echo": _only(False), "logit_bias": _only({}),
    },
    "/v1/responses": {
        **_COMMON, **_CALLS, "input": checked_input, "instructions": _text,
        "max_output_tokens": _LENGTHS["max_output_tokens"], "background": _only(False), "include": _only([]),
        "truncation": _only("disabled"), "text": _only({"format": {"type": "text"}}), "reasoning": _only({}),
    },
}  # fmt: skip
_NEEDED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
POSTED = tuple(_FIELDS)
# What is passed on to transformers, where it is not None
_PASSED = {"messages", "prompt", "input", "instructions", "tools", "chat_template_kwargs", *_LENGTHS}


def read_body(raw: bytes) -> dict:
    """The JSON object of a body. Raises RequestError."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
        json.dumps(body, ensure_ascii=False).encode()  # half surrogates are no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is a JSON {type(body).__name__}: expected an object")
    return body


def read_request(path: str, body: dict, model: str) -> tuple[Asked, dict]:
    """What a body asks for, and the body for transformers. Raises RequestError."""
    known, given = _FIELDS[path], {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in known:
            raise RequestError(f"{name!r} is not known here: {path} takes {', '.join(sorted(known))}", name)
    read = {}
    for name, value in given.items():
        try:
            read[name] = known[name](value)
        except ValueError as error:
            raise RequestError(f"{name} is {_short(value)}: expected {error}", name) from None
    if read.get("model", model) != model:
        words = f"there is no model {_short(read['model'])} here: this server has {model!r} alone, and loads no other"
        raise RequestError(words, "model", 404, "model_not_found")
    if _NEEDED[path] not in read:
        raise RequestError(f"{_NEEDED[path]} is missing", _NEEDED[path])
    passed = {name: value for name, value in read.items() if name in _PASSED}
    if read.get("tool_choice") == "none":
        passed.pop("tools", None)
    tokens = {name: read[name] for name in _TOKENS if name in read}
    if lengths := [read[name] for name in _LENGTHS if name in read]:
        tokens["max_new_tokens"] = min(lengths)
    # transformers' own default of `stream` is not the same everywhere
    return Asked(tokens, read.get("stop", ())), {**passed, "model": model, "stream": read.get("stream", False)}


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
