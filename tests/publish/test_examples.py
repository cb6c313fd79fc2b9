"""The examples people copy from run, on the model that comes with lowbit."""

import io
import runpy
import sys

import pytest
from folders import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def script(name, *arguments, typed=""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_generate(run):
    prompt = "def main():\n    import "
    out = run("generate.py", "reference", prompt)
    assert out.startswith(prompt) and len(out) > len(prompt) + 20


def test_speculative(run):
    prompt = "def main():\n    import "
    alone, *others = run("speculative.py", "reference", prompt).split("--- ")[1:]
    assert len(others) == 2 and all(text.partition("\n")[2].startswith(prompt) for text in (alone, *others))


@pytest.mark.parametrize("end", ["", "\n"], ids=["end-of-input", "empty-line"])
def test_chat(run, end):
    out = run("chat.py", typed="Return the larger number.\nAnd the smaller one?\n" + end)
    assert out.count("> ") == 3 and len(out) > 20


def test_publish(run, hub):
    out = run("publish.py", "reference", "me/", "--upload")
    assert "# reference-W4A16-G128" in out and "Measured on 1,996 tokens of stdlib in windows of 512." in out
    assert out.endswith(f"{hub.url}/me/reference-W4A16-G128\n")
    repo = hub.repos["me/reference-W4A16-G128"]
    assert repo.private and "model.safetensors" in repo.files
