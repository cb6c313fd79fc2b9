"""What README and docs/service.md say of serving, run as it stands there: but for the port, which is a free one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from folders import REFERENCE, ROOT
from pages import README, blocks
from served import SECONDS

import lowbit
from lowbit.generation import open_session

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "service.md"
MODEL = "reference-W4A16-G128"


def lines_of(page: Path, words: str) -> list[str]:
    """The commands of the first block of a page that has them, each in one line; a block of Python is one of them."""
    block = next(block for block in blocks(page) if words in block.code)
    return [block.code] if block.language == "python" else block.lines()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the port, the folder in which the server was started) of the command of the README."""
    folder = tmp_path_factory.mktemp("readme")
    lowbit.quantize(REFERENCE, folder / MODEL, scheme="W4A16")
    command = lines_of(README, "lowbit serve")[0]
    assert command.startswith(f"lowbit serve {MODEL}") and command in lines_of(PAGE, "lowbit serve")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command), "--port", "0"], cwd=folder, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1; chat at", line)
        assert found, line + process.stderr.read()
        yield found[1], folder
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected(served):
    session = open_session(served[1] / MODEL)
    return session.generate(session.encode("import os"), max_new_tokens=40).text


def output(words: list[str], served) -> str:
    """What a command prints, which asks the server."""
    port, folder = served
    words = [re.sub(r"(127\.0\.0\.1|localhost):8000", rf"\1:{port}", word) for word in words]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openai_client_of_the_readme(served, expected):
    python, *words = shlex.split(lines_of(README, "lowbit serve")[1])
    assert python == "python" and output([sys.executable, *words], served) == expected


def test_the_openai_client_of_the_page(served):
    code = lines_of(PAGE, "import openai")[0]
    assert output([sys.executable, "-c", code], served).strip()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_of_the_page(served, expected):
    told = output(shlex.split(lines_of(PAGE, "curl")[0]), served)
    pieces = re.findall(r'"text": ?"((?:[^"\\]|\\.)*)"', told)
    assert "".join(pieces).encode().decode("unicode_escape") == expected and '"completion_tokens":40' in told
