"""README.md is true: its commands run, its code runs, its tables are what the results say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli.main import COMMANDS
from lowbit.folders.locate import resolve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# set up by scripts, which call this test: running them here would go in circles
SCRIPTS = ("bash ", "pip ")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "triton_kernels")])}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(arguments, folder):
    return subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT
    )


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(lowbit [^`]+)`", README)
    return [line for line in [*lines, *inline] if line and not line.startswith(SCRIPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (resolve("reference") / "model.safetensors").is_file():
        pytest.skip("the reference model is not trained yet")
    return tmp_path_factory.mktemp("readme")


def test_commands_run_in_order(folder):
    assert len(commands()) >= 6
    for command in commands():
        words = shlex.split(command)
        assert words[0] == "lowbit"
        # `chat` reads standard input, which is empty here; COMMAND stands for each of them
        for name in COMMANDS if words[1] == "COMMAND" else [words[1]]:
            arguments = [sys.executable, "-m", "lowbit", name, *words[2:]]
            done = run(arguments, folder)
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
            if words[1] == "quantize" and "--method" not in words:
                assert without_seconds(shown_output()) in without_seconds(done.stdout)


def shown_output() -> str:
    """What the README shows of the first `quantize`."""
    return re.search(r"The second one says:\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]


def without_seconds(text: str) -> str:
    return " ".join(re.sub(r"[\d.]+ s$", "", text, flags=re.MULTILINE).split())


def test_python_code_runs(folder):
    code = "\n".join(block for block in blocks("python") if "import lowbit" in block)
    done = run([sys.executable, "-c", code], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "reference-again" / "model.safetensors").is_file()


def test_scripts_and_pages_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for script in re.findall(r"bash (scripts/[\w/]+\.sh)", README):
        assert (ROOT / script).is_file()


def test_tables_come_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
