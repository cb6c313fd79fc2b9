"""The pages in docs/ are true: links lead somewhere, commands have the options they are shown with, api.md is that of
the sources."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from typer.main import get_command

from lowbit.cli.group import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def commands(page: Path) -> list[str]:
    """Every `lowbit ...` of its code blocks and of its text, without comments and what continues a line."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in blocks.splitlines()]
    inline = re.findall(r"`(lowbit [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.removeprefix("$ ") for line in [*lines, *inline] if line.removeprefix("$ ").startswith("lowbit ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_they_are_shown_with(page):
    group = get_command(app)
    for command in commands(page):
        name, *words = shlex.split(re.split(r" [|>&;] | [|>]|\.\.\.", command)[0])[1:]
        if not name.isupper():  # COMMAND
            parameters = group.get_command(click.Context(group), name).params
            options = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
            shown = {word.partition("=")[0] for word in words if word.startswith("-") and not word[1:2].isdigit()}
            assert shown <= options | {"--help"}, f"{command}: {sorted(shown - options)}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == ["index.md"]


def test_the_page_of_the_api_is_what_the_sources_say():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "api_page.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
