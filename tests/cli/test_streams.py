"""Streams that are closed, break or fill up, no memory, late signals: a line or nothing, and the right exit code."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys

import pytest
from folders import ROOT, read_json

from lowbit.cli import streams
from lowbit.cli.ending import one_line_errors
from lowbit.errors import OutputError

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="POSIX streams"), pytest.mark.slow]
COMMAND = [sys.executable, "-m", "lowbit"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Broken(io.StringIO):
    """Takes `room` characters, then fails as a pipe without a reader or a full disk does."""

    def __init__(self, number: int, room: int = 0):
        super().__init__()
        self.number, self.room = number, room
        self.file = open(os.devnull, "w")  # noqa: SIM115 - dup2 goes onto this one, not onto that of the tests

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("words", [("inspect", "--layers"), ("inspect", "--json"), ("push", "me/x", "--dry-run")])
@pytest.mark.parametrize("room", [0, 40])
def test_a_reader_that_goes_away_is_no_error(cli, quantized, monkeypatch, words, room):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE, room))
    outcome = cli(words[0], quantized, *words[1:])
    assert (outcome.code, outcome.err) == (0, "")


def test_help_into_a_pipe_that_closes(cli, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    assert cli("--help").code == 0 and cli("quantize", "--help").code == 0


def test_a_full_disk_behind_standard_output(cli, quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC, 40))
    outcome = cli("inspect", quantized)
    assert outcome.code == 1
    assert outcome.err == "lowbit: error: cannot write to standard output: No space left on device\n"


def test_notes_that_nobody_reads_do_not_stop_a_run(cli, chat_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    outcome = cli("quantize", chat_model, "-o", tmp_path / "out", "--method", "gptq", "--group-size", "32",
                  "--dataset", text_file, "--num-samples", "2", "--seqlen", "32")  # fmt: skip
    assert outcome.code == 0 and (tmp_path / "out" / "config.json").is_file()


CLOSED = {
    "stdin": [("chat",), ("generate", "-p", "-")],
    "stdout": [("chat",), ("generate", "-p", "hello", "--max-new-tokens", "2"), ("push", "me/x", "--dry-run")],
    "stderr": [("chat",), ("push", "me/x", "--dry-run"), ("inspect",)],
}


@pytest.mark.parametrize(
    ("stream", "words"), [(stream, words) for stream, several in CLOSED.items() for words in several], ids=str
)
def test_closed_streams_are_empty_ones(cli, quantized, monkeypatch, stream, words):
    """As Python has them where a shell says `<&-`: None."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if name == stream else io.StringIO("hi\n" if name == "stdin" else ""))
    outcome = cli(words[0], quantized, *words[1:], *(["--max-new-tokens", "2"] if words == ("chat",) else []))
    assert outcome.code == (1 if words[-2:] == ("-p", "-") else 0)  # an empty prompt


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """Else what a library writes to number 2 would land in the weights."""
    code = (
        "import os, sys; from lowbit.cli.streams import dependable_streams\n"
        f"with dependable_streams(): file = open({str(tmp_path / 'x')!r}, 'w'); assert file.fileno() > 2, file.fileno()"
    )
    line = f'exec "$0" -c "$1" <&- >&- 2>&- || echo failed > {tmp_path / "failed"}'
    subprocess.run(["sh", "-c", line, sys.executable, code], env=ENVIRONMENT, check=True)
    assert (tmp_path / "x").is_file() and not (tmp_path / "failed").exists()


def test_a_terminal_of_few_letters(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    taken = sys.stderr
    assert cli("inspect", tmp_path / "Zwölf").code == 1
    taken.flush()
    assert b"Zw\\xf6lf" in taken.buffer.getvalue()


@pytest.mark.slow
def test_processes_of_their_own(quantized):
    """What the other tests see in this process is what a shell sees."""
    for words, line in (
        (("inspect", quantized, "--layers"), '"$@" | head -c 1 >/dev/null; exit "${PIPESTATUS[0]}"'),
        (("inspect", quantized), 'exec "$@" >&-'),
    ):
        done = subprocess.run(["bash", "-c", line, "bash", *COMMAND, *map(str, words)], env=ENVIRONMENT,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done


# No memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried\nto"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_one_line(capfd, error):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lowbit: error: there is not enough memory (")


def test_a_package_that_is_not_there_is_one_line(capfd):
    with pytest.raises(SystemExit), one_line_errors():
        import no_such_package  # noqa: F401
    (line,) = capfd.readouterr().err.splitlines()
    assert "No module named 'no_such_package'" in line


def test_faults_of_ours_keep_their_traceback():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("x")


def test_little_memory_in_a_process_of_its_own(chat_model, tmp_path):
    """Whatever fails first: one line, exit code 1, nothing left over."""
    command = [*COMMAND, "quantize", str(chat_model), "-o", str(tmp_path / "out")]
    for megabytes in (60, 300):

        def limited(limit=megabytes * 2**20):
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limited)
        assert done.returncode == 1 and "Traceback" not in done.stderr, (megabytes, done)
        assert done.stderr.splitlines()[-1].startswith("lowbit: error: "), (megabytes, done)
        assert list(tmp_path.iterdir()) == []


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_signal_after_the_last_rename_is_too_late(cli, chat_model, text_file, tmp_path, monkeypatch, number, method):
    from lowbit.quantization import run

    real = run.StagedFolder.commit

    def commit(self):
        real(self)
        signal.raise_signal(number)

    monkeypatch.setattr(run.StagedFolder, "commit", commit)
    data = ["--dataset", text_file, "--num-samples", "2", "--seqlen", "32"] if method == "gptq" else []
    outcome = cli("quantize", chat_model, "-o", tmp_path / "out", "--method", method, "--group-size", "32", *data)
    assert outcome.code == 0 and f"written to {tmp_path / 'out'}" in outcome.out and "interrupted" not in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    assert read_json(tmp_path / "out" / "lowbit_report.json")["recipe"]["method"] == method


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_say_that_finished_layers_are_kept(cli, chat_model, text_file, tmp_path, monkeypatch, number):
    from lowbit.quantization.calibrated.job import Job

    real = Job.commit

    def commit(self, *arguments, **options):
        real(self, *arguments, **options)
        signal.raise_signal(number)

    monkeypatch.setattr(Job, "commit", commit)
    command = ["quantize", chat_model, "-o", tmp_path / "out", "--method", "gptq", "--group-size", "32", "--dataset",
               text_file, "--num-samples", "2", "--seqlen", "32"]  # fmt: skip
    outcome = cli(*command)
    kept, ended = outcome.err.splitlines()[-2:]
    assert outcome.code == 1 and kept == "1 finished layer(s) are kept: the same command goes on from there"
    assert ended == "lowbit: interrupted, nothing was left half-made"


def test_errors_of_writing_are_errors_of_the_output():
    stream = streams._Results(Broken(errno.EIO))
    with pytest.raises(OutputError, match="cannot write to standard output"):
        stream.write("x")
