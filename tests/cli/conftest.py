"""Runs commands in this process, as `main` does in its own."""

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from folders import save_chat_model

import lowbit


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli(*arguments) -> Outcome. What `main` lets through is the traceback a user would see."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    level = logging.getLogger("lowbit").level

    def run(*arguments) -> Outcome:
        from lowbit.cli.main import main

        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.getLogger("lowbit").setLevel(level)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer and a chat template. Not to be changed."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def quantized(chat_model) -> Path:
    """`chat_model` in 4 bits. Not to be changed."""
    folder = chat_model.with_name("chat-W4A16")
    lowbit.quantize(chat_model, folder, group_size=32)
    return folder
