"""The pages that users read, and the blocks of code in them.

A block of `bash` or `python` is run by tests/cli/test_docs_run.py, unless the line before it says why not:
<!-- norun: needs a GPU -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

from folders import ROOT

README = ROOT / "README.md"
# Whose blocks are run
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^(?:<!-- norun:(?P<reason>.*?)-->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """language: what is behind the fence, "" for nothing. reason: why it is not run, None if it is."""

    language: str
    code: str
    reason: str | None

    def lines(self) -> list[str]:
        """Its commands, without comments, each in one line."""
        lines = (line.split("  #")[0].strip() for line in self.code.replace("\\\n", " ").splitlines())
        return [line.removeprefix("$ ") for line in lines if line]


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["language"], m["code"], m["reason"] and m["reason"].strip()) for m in found]


def inline_commands(page: Path) -> list[str]:
    """Every `lowbit ...` in the text between the blocks."""
    return re.findall(r"`(lowbit [^`]+)`", _BLOCK.sub("", page.read_text(encoding="utf-8")))
