"""The messages, inputs and tools of requests: whatever transformers looks into is there, and of the type it takes.

Each function returns what it was given, or raises ValueError with what is expected.
"""

import json
from typing import Any

_TEXT_PARTS = ("text", "input_text", "output_text")


def checked_messages(value: Any) -> list[dict]:
    """Those of /v1/chat/completions: [{"role": ..., "content": ...}]"""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of messages, each with a role and a content")
    for number, message in enumerate(value):
        _check_message(message, f"messages[{number}]")
    return value


def checked_input(value: Any) -> str | list[dict]:
    """That of /v1/responses: text, or a list of messages, calls of functions and what they gave."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("text, or a list of items")
    if "role" not in value[0] and value[0].get("type") in _TEXT_PARTS:
        _check_content(value, "input")
        return value
    for number, item in enumerate(value):
        _check_item(item, f"input[{number}]")
    return value


def checked_tools(value: Any) -> list[dict] | None:
    """[{"type": "function", "function": {"name": ..., "parameters": {...}}}], or the same without the level between."""
    expected = "a list of functions, each with a name"
    if not isinstance(value, list):
        raise ValueError(expected)
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
        ):
            raise ValueError(expected)
        if not isinstance(function.get("parameters") or {}, dict):
            raise ValueError("parameters of a function to be a JSON schema")
    return value or None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} to be an object with a role")
    _check_content(message.get("content"), f"{where}.content")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls to be a list")
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}.tool_calls to have functions with a name")
        _check_arguments(function.get("arguments"), f"{where}.tool_calls")


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list) else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} to be text, or parts of the type text: this server reads nothing else")


def _check_arguments(arguments: Any, where: str) -> None:
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise ValueError(f"{where}: the arguments of a function to be a JSON object")


def _check_item(item: dict, where: str) -> None:
    kind = item.get("type")
    if kind == "reasoning":
        for part in item.get("content") or ():
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise ValueError(f"{where}.content to be parts with a text")
    elif "role" in item:
        _check_message(item, where)
    elif kind == "function_call":
        if not all(isinstance(item.get(name), str) for name in ("call_id", "name")):
            raise ValueError(f"{where} to have a call_id and a name")
        _check_arguments(item.get("arguments"), where)
    elif kind == "function_call_output":
        if not all(isinstance(item.get(name), str) for name in ("call_id", "output")):
            raise ValueError(f"{where} to have a call_id and an output, both text")
    else:
        raise ValueError(f"{where} to have a role, or to be a function_call or a function_call_output")
