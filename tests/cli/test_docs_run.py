"""Every block of code in README.md and docs/ runs, on the model that comes with lowbit. tests/test_docs.py sees to it
that a block is run or says why not."""

import io
import re
import shlex
import shutil
import sys

import pytest
from folders import REFERENCE
from hub import running_hub
from pages import PAGES, README, blocks, inline_commands

import lowbit
from lowbit.cli.main import COMMANDS

pytestmark = pytest.mark.slow

# What pages call the user's model, and folders that they have quantized
MODELS = {"org/model": "reference", "MODEL": "reference"}
FOLDERS = ("reference-W4A16-G128", "model-W4A16", "DIR", "folder")
# Less of the same work: of options given twice the last counts
SMALLER = {
    "calibrated": ("--num-samples", "2", "--seqlen", "32"),
    "eval": ("--num-tokens", "2000"),
    "merge": ("--heldout-tokens", "256"),
    "bench": (
        "--rounds",
        "1",
        "--new-tokens",
        "4",
        "--prompt-tokens",
        "16",
        "--batch",
        "1",
        "--against",
        "unquantized",
    ),
}
RUN = {page: [b for b in blocks(page) if b.reason is None and b.language in ("bash", "python")] for page in PAGES}


@pytest.fixture(scope="module")
def quantized_reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "reference-W4A16-G128"
    lowbit.quantize(REFERENCE, folder, scheme="W4A16")
    return folder


@pytest.fixture
def here(quantized_reference, monkeypatch, tmp_path):
    """here(page) makes the folders that the page has not made itself, in the current one."""
    monkeypatch.chdir(tmp_path)

    def prepare(page):
        text = page.read_text(encoding="utf-8")
        for name in FOLDERS:
            if re.search(rf"\b{name}\b", text) and f"-o {name} " not in text:
                shutil.copytree(quantized_reference, tmp_path / name)
        return tmp_path

    return prepare


@pytest.fixture
def typed(done, monkeypatch):
    """typed(command) -> its outcome; a chat is told one line."""

    def run(command: str):
        name, *words = shlex.split(command)[1:]
        words = [MODELS.get(word, word) for word in words]
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        kind = "calibrated" if name in ("quantize", "merge") and {"gptq", "--dataset"} & {*words} else name
        outcome = done(name, *words, *(() if "--help" in words else SMALLER.get(kind, ())))
        if name in ("generate", "chat"):
            drafts = any(option in words for option in ("--assistant", "--prompt-lookup"))
            assert ("by model.generate" if drafts else " loop") in outcome.err or "--stats" not in words, outcome
        return outcome

    return run


@pytest.mark.parametrize("page", [page for page in RUN if RUN[page]], ids=lambda page: page.name)
def test_blocks_run(page, typed, here, quantized_reference, monkeypatch):
    folder, names = here(page), {"path": quantized_reference}
    with running_hub(monkeypatch) as hub:
        # nothing but an upload may ask it
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", page.name != "publishing.md")
        for block in RUN[page]:
            if block.language == "python":
                exec(compile(block.code, page.name, "exec"), names)
            for line in block.lines() if block.language == "bash" else ():
                typed(line)
    left = {path.name for path in folder.iterdir()}
    if page.name == "generation.md":
        assert names["answer"].tokens > 1 and names["result"].tokens.shape[0] == 2
    elif page.name == "publishing.md":
        (repo,) = hub.repos.values()
        assert not repo.private and "model.safetensors" in repo.files
    elif page == README:
        assert {"reference-again", "reference-plain", "reference-W4A16-mlx"} <= left


def test_the_readme_shows_what_quantize_prints(typed, here):
    here(README)
    shown = re.search(r"The second one says:\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    printed = typed("lowbit quantize reference -o reference-W4A16-G128 --scheme W4A16").out
    assert without_seconds(shown) in without_seconds(printed)


def without_seconds(text: str) -> str:
    return " ".join(re.sub(r"[\d.]+ s$", "", text, flags=re.MULTILINE).split())


def test_commands_in_the_text_of_the_readme_run(typed, quantized_reference, monkeypatch):
    monkeypatch.chdir(quantized_reference.parent)
    for command in inline_commands(README):
        for name in COMMANDS if " COMMAND " in command else [""]:  # which stands for each of them
            typed(command.replace("COMMAND", name))
