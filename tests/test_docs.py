"""The pages for users and developers are true: links lead somewhere, commands have the options they are shown with, no
block of code hides from the test that runs it, what is rendered is what the sources say."""

import re
import runpy
import shlex
import subprocess
import sys

import click
import pytest
from folders import ROOT
from pages import PAGES, blocks, inline_commands
from typer.main import get_command

from lowbit.cli.group import app

ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
# How a line begins that is typed somewhere
TYPED = ("lowbit ", "vllm ", "pip ", "python ", "bash ", "import ", "from ")
each_page = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@each_page
def test_commands_have_the_options_they_are_shown_with(page):
    group = get_command(app)
    lines = [line for block in blocks(page) for line in block.lines() if line.startswith("lowbit ")]
    for command in lines + inline_commands(page):
        name, *words = shlex.split(re.split(r" [|>&;] | [|>]|\.\.\.", command)[0])[1:]
        if not name.isupper():  # COMMAND
            parameters = group.get_command(click.Context(group), name).params
            options = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
            shown = {word.partition("=")[0] for word in words if word.startswith("-") and not word[1:2].isdigit()}
            assert shown <= options | {"--help"}, f"{command}: {sorted(shown - options)}"


@each_page
def test_scripts_that_are_named_exist(page):
    for script in re.findall(r"\b((?:scripts|examples|tests)/[\w/]+\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page):
    """A block of commands or of Python says so behind its fence; what is run is `lowbit` alone."""
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) == text.count("```") / 2, "a block that cannot be read, or is indented"
    assert sum(block.reason is not None for block in blocks(page)) == text.count("<!-- norun"), "a mark beside no block"
    for block in blocks(page):
        assert block.reason is None or block.reason, f"norun without a reason: {block.code}"
        if block.language not in ("bash", "python"):
            assert not any(line.startswith(TYPED) for line in block.lines()), f"not marked as code: {block.code}"
        elif block.language == "bash" and block.reason is None:
            assert all(line.startswith("lowbit ") for line in block.lines()), block.code


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == ["index.md"]


def test_the_page_of_the_api_is_what_the_sources_say():
    script = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()


@pytest.mark.slow
def test_tables_are_what_the_results_say():
    script = ROOT / "scripts" / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
