"""Wrong usage is said before anything heavy is imported; help and versions by their usual names."""

import io
import json
import os
import subprocess
import sys

import pytest
from folders import ROOT, contents, save_random_llama

import lowbit
from lowbit.cli.commands.convert import FORMATS
from lowbit.cli.main import COMMANDS
from lowbit.conversion.formats import EXPORTS
from lowbit.errors import UsageError

HEAVY = {"torch", "transformers", "huggingface_hub", "numpy", "rich.console"}
# Runs each command in a fork of a process that has imported no more than `lowbit --help` does
CHECK = f"""
import json, os, sys
from lowbit.cli import group
from lowbit.cli.main import main
for words in json.load(sys.stdin):
    if not (child := os.fork()):
        sys.argv[1:] = words
        try:
            main()
        except SystemExit as ended:
            print(ended.code, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

WRONG = {
    "no output": ("quantize", "MODEL"),
    "format": ("quantize", "MODEL", "-o", "x", "--format", "foo"),
    "method": ("quantize", "MODEL", "-o", "x", "--method", "foo"),
    "scheme": ("quantize", "MODEL", "-o", "x", "--scheme", "W4A17"),
    "bits": ("quantize", "MODEL", "-o", "x", "--bits", "7"),
    "override": ("quantize", "MODEL", "-o", "x", "--override", "a=W7A16"),
    "existing": ("quantize", "MODEL", "-o", "MODEL"),
    "own folder": ("quantize", "MODEL", "-o", "."),
    "plan": ("plan", "MODEL", "--format", "foo"),
    "convert": ("convert", "MODEL", "-o", "x", "--format", "foo"),
    "convert to nowhere": ("convert", "MODEL"),
    "dequantize": ("dequantize", "MODEL"),
    "merge": ("merge", "MODEL", "MODEL"),
    "method of merge": ("merge", "MODEL", "MODEL", "-o", "x", "--method", "foo"),
    "stop": ("generate", "MODEL", "-p", "x", "--stop", ""),
    "chat stop": ("chat", "MODEL", "--stop", ""),
    "dtype": ("eval", "MODEL", "--dtype", "int4"),
    "no model": ("verify",),
    "bench": ("bench", "MODEL", "--batch", "0"),
    "tune": ("tune", "MODEL", "--dtype", "x"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_wrong_usage_imports_nothing_heavy(chat_model, tmp_path):
    commands = [[str(chat_model) if word == "MODEL" else word for word in words] for words in WRONG.values()]
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, input=json.dumps(commands), text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(WRONG) and done.stdout == "", done
    for name, message, outcome in zip(WRONG, lines[::2], lines[1::2], strict=True):
        code = 1 if name == "existing" else 2
        assert message.startswith("lowbit: error: ") and outcome == f"{code} []", (name, message, outcome)


def test_the_formats_of_convert_are_those_of_the_pipeline():
    assert (*lowbit.formats.FORMATS, *EXPORTS) == FORMATS


@pytest.mark.parametrize("output", [".", "", "..", "../empty", "../.."])
@pytest.mark.parametrize("command", ["quantize", "convert", "dequantize"])
def test_the_folder_of_the_shell_is_not_replaced(cli, quantized, chat_model, tmp_path, monkeypatch, command, output):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = os.stat(".").st_ino, contents(tmp_path)
    outcome = cli(command, chat_model if command == "quantize" else quantized, "-o", output, "--overwrite")
    assert outcome.code == 2 and "is the one this command runs in" in outcome.err
    assert (os.stat(".").st_ino, contents(tmp_path)) == before


@pytest.mark.parametrize("output", [".", "..", "../empty"])
def test_nor_is_that_of_a_script(chat_model, tmp_path, monkeypatch, output):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="is the one this command runs in"):
        lowbit.quantize(chat_model, output, group_size=32)
    assert contents(tmp_path) == {"empty": b""}


def test_an_empty_folder_elsewhere_may_be_the_output(done, chat_model, tmp_path):
    (tmp_path / "out").mkdir()
    done("quantize", chat_model, "-o", tmp_path / "out", "--group-size", "32")


def test_an_empty_model_name(refused):
    refused(1, "quantize", "", "-o", "x", says="no model is named")
    refused(1, "generate", "", "-p", "x", says="no model is named")


@pytest.mark.parametrize("words", [("-h",), ("help",), ("--help",), ("quantize", "-h"), ("help", "quantize")], ids=str)
def test_help_by_its_usual_names(done, words):
    out = done(*words).out
    assert "Usage: lowbit" in out and ("--scheme" in out) == ("quantize" in words)


@pytest.mark.parametrize("command", COMMANDS)
def test_version_of_a_command(done, command):
    assert done(command, "--version").out == f"lowbit {lowbit.__version__}\n"
    assert "--version" not in done(command, "--help").out


def test_an_unknown_command_is_wrong_usage(cli):
    assert cli("help", "nothing").code == 2 and cli("nothing").code == 2


@pytest.mark.parametrize(("typed", "prompt"), [("text\n", "text"), ("text\r\n", "text"), ("a\n\n", "a\n"), ("a", "a")])
def test_a_prompt_from_standard_input_ends_with_its_last_letter(json_of, quantized, monkeypatch, typed, prompt):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed, newline=""))
    assert json_of("generate", quantized, "-p", "-", "--max-new-tokens", "1")["prompt"] == prompt


def test_long_lists_are_cut_short(done, tmp_path):
    """Groups of 128 divide no side of this model: every layer is in the list."""
    model = save_random_llama(tmp_path / "model", 96, 160, 4)
    lines = done("quantize", model, "-o", tmp_path / "out").out.splitlines()
    assert sum("W4A16-G" in line for line in lines) == 12
    assert "  and 16 more (--json has all)" in lines
