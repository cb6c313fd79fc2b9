"""docs/generation.md is true: its commands and its code run, its options are those of the commands."""

import io
import re
import shlex
import sys

import pytest
from folders import ROOT

from lowbit.cli.main import load_command

PAGE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)]
DRAFTING = "--assistant", "--prompt-lookup"


@pytest.mark.parametrize("block", BLOCKS, ids=["options", "drafts"])
def test_commands_run(block, done, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in block:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        outcome = done(*shlex.split(command)[1:])
        path = "by model.generate" if any(option in command for option in DRAFTING) else " loop"
        assert (path in outcome.err) == ("--stats" in command)


def test_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert names["answer"].tokens > 1 and " loop" in capsys.readouterr().out
    assert names["result"].tokens.shape[0] == 2


def test_options_are_those_of_the_commands():
    commands = {shlex.split(command)[1] for block in BLOCKS for command in block}
    assert commands == {"generate", "chat", "quantize"}
    known = {name for command in commands for p in load_command(command).params for name in p.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known
