"""docs/generation.md is true: its commands and its code run, its options are those of the commands."""

import io
import re
import shlex
import sys

import pytest
from folders import ROOT

from lowbit.cli.main import load_command

PAGE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, done, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    outcome = done(*shlex.split(command)[1:])
    assert ("by static loop" in outcome.err) == ("--stats" in command)


def test_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["answer"].tokens > 1 and "static loop" in capsys.readouterr().out
    assert names["result"].tokens.shape[0] == 2


def test_options_are_those_of_the_commands():
    known = {name for command in ("generate", "chat") for p in load_command(command).params for name in p.opts}
    assert len(COMMANDS) == 5 and set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known
