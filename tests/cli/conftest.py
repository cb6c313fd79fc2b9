"""Runs commands in this process, as `main` does in its own."""

import json
import logging
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from folders import contents, save_chat_model

import lowbit

TEXT = "the quick brown fox jumps over the lazy dog and sleeps. Zwölf Boxkämpfer jagen Viktor!\n" * 12


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


@pytest.fixture
def done(cli):
    """done(*arguments) -> what a command that works prints."""

    def run(*arguments):
        outcome = cli(*arguments)
        assert outcome.code == 0 and "Traceback" not in outcome.err, outcome
        return outcome

    return run


@pytest.fixture
def json_of(done):
    """The JSON on standard output, with nothing around it and nothing on standard error."""

    def run(*arguments):
        outcome = done(*arguments, "--json")
        assert outcome.err == ""
        return json.loads(outcome.out, parse_constant=pytest.fail)  # NaN is no JSON

    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def refused(cli, tmp_path):
    """refused(code, *arguments, says=[...]): exactly one line, the code, the words, and tmp_path as it was."""

    def check(code, *arguments, says=()):
        before = contents(tmp_path).keys()
        outcome = cli(*arguments)
        lines = outcome.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("lowbit: error: "), outcome
        assert outcome.code == code, outcome
        assert len(lines[0]) < 600
        for word in says if isinstance(says, list | tuple) else [says]:
            assert str(word) in lines[0], lines[0]
        assert contents(tmp_path).keys() <= before
        return lines[0]

    return check


@pytest.fixture
def wrong_usage(cli, tmp_path):
    """Options that the parser itself refuses: usage lines are fine, a traceback is not."""

    def check(*arguments, says):
        before = contents(tmp_path).keys()
        outcome = cli(*arguments)
        assert outcome.code == 2 and "Error" in outcome.err and "Traceback" not in outcome.err, outcome
        assert says in outcome.err
        assert contents(tmp_path).keys() == before

    return check


@pytest.fixture
def source(tmp_path, chat_model):
    """A model of its own for each test, to be damaged."""
    return shutil.copytree(chat_model, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return save_chat_model(tmp_path / "model", max_shard_size="60KB")


@pytest.fixture
def quantize(refused, tmp_path):
    """quantize(model, *options, says=..., code=1) is refused."""

    def check(model, *options, says=(), code=1):
        return refused(code, "quantize", model, "-o", tmp_path / "out", *options, says=says)

    return check
