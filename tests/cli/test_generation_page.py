"""docs/generation.md names options of the commands that it shows, and no others."""

import re
import shlex

from folders import ROOT
from pages import blocks

from lowbit.cli.main import load_command

PAGE = ROOT / "docs" / "generation.md"


def test_options_are_those_of_the_commands():
    lines = [line for block in blocks(PAGE) if block.language == "bash" for line in block.lines()]
    commands = {shlex.split(line)[1] for line in lines}
    assert commands == {"generate", "chat", "quantize"}
    known = {name for command in commands for p in load_command(command).params for name in p.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8"))) <= known
