"""Names and texts of strangers: whatever is in them, it reaches no terminal as a command and no line ends early."""

import json
import logging
import re
import shutil

import pytest
from folders import edit_config, edit_tensors, read_json, write_json

ESC = "\x1b"
EVIL = f"{ESC}[2J{ESC}]0;title\x07[red]a[/x][link=http://evil]b\r\nlowbit: written :smile:\u202e\x9b1m"
# The line breaks of tables, and of lists: all else that is no text would be ours or a terminal's
PRINTABLE = "[red]a[/x][link=http://evil]b :smile:"  # a tensor's name may hold no more, or the file is refused
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def check(outcome):
    for text in (outcome.out, outcome.err):
        assert not CONTROL.search(text), (CONTROL.search(text), text)
        assert "Traceback" not in text
        assert not any(line.startswith("lowbit: written") for line in text.splitlines()), text
    return outcome


@pytest.fixture(scope="module")
def hostile(quantized, tmp_path_factory):
    """A quantized folder whose every name is an attack, as far as it still opens."""
    folder = shutil.copytree(quantized, tmp_path_factory.mktemp("hostile") / "[bold]model")
    edit_config(folder, architectures=[EVIL])
    edit_tensors(folder, lambda tensors: tensors.update({PRINTABLE + ".weight": tensors["model.norm.weight"].clone()}))
    report = read_json(folder / "lowbit_report.json")
    report |= {"source": EVIL, "command": EVIL, "machine": EVIL, "left_alone": {EVIL: EVIL}, "date": EVIL}
    write_json(folder / "lowbit_report.json", report)
    (folder / "[x].md").write_text(EVIL)
    (folder / "[link=evil.example]click.md").write_text("")
    (folder / "README.md").write_text("---\ntags: [" + json.dumps(EVIL) + "]\n---\n")
    return folder


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("inspect",), 0),
        (("inspect", "--layers"), 0),
        (("inspect", "--json"), 0),
        (("verify", "--no-run"), 1),
        (("plan",), 1),
        (("doctor",), 0),
        (("generate", "-p", "x"), 1),
        (("eval",), 1),
        (("dequantize", "-o", "OUT"), None),
        (("convert", "--format", "gptq", "-o", "OUT"), None),
        (("report", "-o", "OUT"), 0),
        (("push", "me/x", "--dry-run"), 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_commands_on_a_hostile_folder(cli, hostile, tmp_path, command, code):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    outcome = check(cli(words[0], hostile, *words[1:]))
    assert code is None or outcome.code == code, outcome
    if outcome.code:
        assert len([line for line in outcome.err.splitlines() if line.startswith("lowbit: error: ")]) <= 1


def test_names_are_shown_letter_by_letter(cli, hostile):
    """Spelled out, not swallowed: no markup, no emoji, no links."""
    shown = "".join(cli("inspect", hostile).out.split())
    assert r"\x1b[2J\x1b]0;title\x07[red]a[/x][link=http://evil]b\r\nlowbit:written:smile:\u202e\x9b1m" in shown
    listed = cli("push", hostile, "me/x", "--dry-run").err
    assert "[x].md" in listed and "[link=evil.example]click.md" in listed


def test_error_lines_are_one_line(refused, source):
    edit_config(source, model_type=EVIL)
    refused(1, "generate", source, "-p", "x")
    refused(1, "inspect", f"no/such\n{EVIL}")


def test_notes_of_a_run_are_data(cli, source, tmp_path):
    """Progress and announcements name tensors and files, which strangers named."""
    folder = source.rename(source.with_name("[x]model"))
    text = tmp_path / "[red]te[x]t.txt"
    text.write_text("some words of text, again and again\n" * 400)
    outcome = check(cli("quantize", folder, "-o", tmp_path / "out", "--method", "gptq", "--group-size", "32",
                        "--dataset", text, "--num-samples", "2", "--seqlen", "32"))  # fmt: skip
    assert outcome.code == 0 and text.name in outcome.err and text.name in outcome.out


def test_progress_bars_show_names_as_they_are(monkeypatch, capfd):
    from lowbit.cli import terminal

    shown = terminal.Terminal(stderr=True)
    monkeypatch.setattr(terminal, "notes", shown)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(type(shown), "is_terminal", True)
    with terminal.progress(EVIL, 2) as advance:
        advance(1, EVIL)
    monkeypatch.setattr(type(shown), "is_terminal", False)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0.0)
    with terminal.progress(EVIL, 2) as advance:
        advance(1, EVIL)
    with terminal.status() as say:
        say(EVIL)
    err = capfd.readouterr().err
    assert not CONTROL.search(err.replace(f"{ESC}[?25h", "").replace(f"{ESC}[?25l", "")) and "[red]a[/x]" in err


def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capfd):
    from lowbit.cli import terminal

    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress("quantizing", 100) as advance:
        for second in range(0, 200, 10):
            now[0] = float(second)
            advance(5, f"layer {second}")
    assert capfd.readouterr().err.splitlines() == [
        "quantizing: 35% after 1 min, layer 60", "quantizing: 65% after 2 min, layer 120",
        "quantizing: 95% after 3 min, layer 180",
    ]  # fmt: skip


def test_log_lines_are_one_line(capfd):
    from lowbit.cli.group import _ToNotes

    _ToNotes().handle(logging.makeLogRecord({"msg": "a name: %s", "args": (EVIL,)}))
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and not CONTROL.search(err)


class Speaking:
    """A tokenizer that gives escape sequences, each in pieces."""

    pieces = ("a", ESC, "[3", "1m", "b\n", ESC + "]0;t", "itle", "\x07", "c\td\r\n", "\x9b", "2J", "e\u202ef", "[red]")

    def decode(self, ids, **_):
        return "".join(self.pieces[token % len(self.pieces)] for token in ids)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_generated_text_keeps_lines_and_loses_escape_sequences(cli, quantized, monkeypatch, command):
    import io

    from lowbit.generation import Session
    from lowbit.generation.stats import Stats
    from lowbit.generation.stream import Generation, TextStream

    def generate(self, ids, on_text, **options):
        stream = TextStream(Speaking(), (), on_text)
        for token in range(len(Speaking.pieces)):
            stream.put(token)
        stream.finish()
        return Generation(stream.text, Stats(1, 1))

    monkeypatch.setattr(Session, "generate", generate)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    prompt = ("-p", "the prompt: ") if command == "generate" else ()
    outcome = cli(command, quantized, *prompt)
    assert outcome.code == 0, outcome
    assert outcome.out == ("the prompt: " if prompt else "") + "ab\nc\td\nef[red]\n"
    if prompt:  # exact, for programs
        exact = json.loads(cli(command, quantized, *prompt, "--json").out)["text"]
        assert exact == Speaking().decode(range(len(Speaking.pieces)))


def test_a_card_of_ones_own_is_shown_without_escape_sequences(cli, quantized, tmp_path):
    (tmp_path / "card.md").write_text(f"# Title\n\n{EVIL}\n\ttext\n", encoding="utf-8")
    out = cli("push", quantized, "me/x", "--dry-run", "--card", tmp_path / "card.md").out
    assert out.startswith("# Title\n\n[red]a[/x]") and out.endswith("\n\ttext\n") and ESC not in out
