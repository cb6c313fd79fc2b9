"""lowbit chat, through a pipe and on a terminal."""

import io
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from folders import ROOT, read_json, save_chat_model, save_tokenizer
from models import save_tiny
from transformers import AutoTokenizer

import lowbit

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "lowbit"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def test_chat_through_a_pipe(done, quantized, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = ["!help", "hello", "and again", "!save first.json", "!clear", "once more", "", "!save", "!nonsense",
             "!save no/such/folder/x.json", "!exit", "never read"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    outcome = done("chat", quantized, "--system", "be brief", "--max-new-tokens", "6", "--temperature", "0")
    first, second = read_json("first.json"), read_json("chat.json")
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in first if m["role"] != "assistant"] == ["be brief", "hello", "and again"]
    assert [m["content"] for m in second if m["role"] != "assistant"] == ["be brief", "once more"]
    answers = [m["content"] for m in (*first, *second) if m["role"] == "assistant"]
    assert len(answers) == 3 and outcome.out == "".join(f"{answer}\n" for answer in answers)
    for words in (
        "forget the conversation",
        "forgotten",
        "no command !nonsense",
        "cannot write",
        "saved to first.json",
    ):
        assert words in outcome.err
    assert "never read" not in outcome.err


def test_answers_follow_the_chat_template(done, quantized, monkeypatch, tmp_path):
    """The second answer is the greedy continuation of the whole conversation as the template writes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n!save\n"))
    done("chat", quantized, "--max-new-tokens", "6", "--temperature", "0")
    messages = read_json("chat.json")
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    ids = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = lowbit.load(quantized).generate(**ids, max_new_tokens=6, do_sample=False)
    answer = output[0, ids["input_ids"].shape[1] :]
    assert messages[3]["content"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_chat_without_a_template(done, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", vocab_size=320)
    save_tokenizer(tmp_path / "model", chat_template=None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert "4 tokens" in done("chat", tmp_path / "model", "--max-new-tokens", "4", "--temperature", "0").err


def test_chat_that_outgrows_the_context_goes_on(done, quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'!?' * 200}x\n{'?!' * 200}x\n!clear\nhello\n"))
    outcome = done("chat", quantized, "--max-new-tokens", "4", "--temperature", "0")
    assert outcome.err.count("context") == 1 and "4 tokens" in outcome.err


def test_a_sliding_context_drops_the_oldest_turns(done, quantized, monkeypatch, tmp_path):
    """The system prompt stays, the conversation is kept for !save, and it is said once."""
    from lowbit.generation import Session

    monkeypatch.chdir(tmp_path)
    real, shown = Session.generate, []

    def generate(self, ids, **options):
        shown.append(self.tokenizer.decode(ids[0]))
        assert ids.shape[1] <= 256 - 24
        return real(self, ids, **options)

    monkeypatch.setattr(Session, "generate", generate)
    questions = [f"question {number} " + "fox " * 12 for number in range(8)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "!save"]) + "\n"))
    options = ("--system", "be brief", "--max-new-tokens", "24", "--temperature", "0", "--context", "slide")
    outcome = done("chat", quantized, *options)
    assert outcome.err.count("oldest turns are dropped") == 1
    assert len(shown) == 8 and all(prompt.startswith("<system>be brief") for prompt in shown)
    assert all(f"question {number}" in prompt for number, prompt in enumerate(shown))
    assert "question 0" in shown[1] and "question 0" not in shown[-1] and "question 6" in shown[-1]
    assert sum(message["role"] == "user" for message in read_json("chat.json")) == 8


def test_a_full_context_stops(done, quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 190 + "\nand again\n!clear\nhello\n"))
    outcome = done("chat", quantized, "--max-new-tokens", "200", "--temperature", "0", "--context", "stop")
    assert outcome.err.count("the context is full") == 1 and outcome.err.count("!clear forgets") == 1


def test_a_question_that_is_too_long_by_itself(done, quantized, monkeypatch):
    """It is refused, and costs no turn of the conversation."""
    from lowbit.generation import Session

    real, shown = Session.encode_chat, []
    monkeypatch.setattr(Session, "encode_chat", lambda self, messages: shown.append(messages) or real(self, messages))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" + "x" * 400 + "\nonce more\n"))
    outcome = done("chat", quantized, "--max-new-tokens", "4", "--temperature", "0", "--context", "slide")
    assert outcome.err.count("exceed the model's context") == 1 and outcome.err.count("4 tokens") == 2
    assert [message["content"] for message in shown[-1] if message["role"] == "user"] == ["hello", "once more"]
    assert "dropped" not in outcome.err


@pytest.mark.usefixtures("compiler")
def test_statistics_in_chat(done, quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("!stats\nhello\nand again\n!stats\n"))
    outcome = done("chat", quantized, "--max-new-tokens", "4", "--temperature", "0")
    assert "no answer yet" in outcome.err and outcome.err.count("by recorded loop") == 1
    assert "in the cache" in outcome.err  # the first turn
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))
    outcome = done("chat", quantized, "--max-new-tokens", "4", "--temperature", "0", "--stats")
    assert outcome.err.count("by recorded loop") == 2


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text(cli, quantized, monkeypatch, errors):
    """Refused or replaced, as the locale has it, but no traceback; `strict` is what UTF-8 locales read with."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n!exit\n"), "utf-8", errors))
    assert cli("chat", quantized, "--max-new-tokens", "4").code in (0, 1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors))
    assert cli("generate", quantized, "--prompt", "-", "--max-new-tokens", "4").code in (0, 1)


def test_ctrl_c_before_the_first_token(done, quantized, monkeypatch, tmp_path):
    """A long prompt takes its time: stopping there must not end the program either, and the question is forgotten."""
    from lowbit.generation import Session

    monkeypatch.chdir(tmp_path)
    real, calls = Session.encode_chat, []

    def encode_chat(self, messages):
        calls.append(messages)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, messages)

    monkeypatch.setattr(Session, "encode_chat", encode_chat)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nonce more\n!save\n"))
    done("chat", quantized, "--max-new-tokens", "4", "--temperature", "0")
    assert [m["content"] for m in read_json("chat.json") if m["role"] == "user"] == ["once more"]


class Silence(AssertionError):
    """Words that were expected did not come."""


class Terminal:
    """A process on a pseudo terminal."""

    def __init__(self, *command):
        import pty

        self.terminal, child_side = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), child_side)
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, start_new_session=True, preexec_fn=_own_terminal, **streams
        )
        os.close(child_side)
        self.seen = ""

    def expect(self, words: str, timeout: float = 600) -> str:
        """Wait for words; returns what came up to them and forgets it."""
        deadline = time.monotonic() + timeout
        while words not in self.seen:
            self.receive(words, deadline)
        before, _, self.seen = self.seen.partition(words)
        return before

    def expect_anything(self) -> None:
        """What a random model writes depends on the processor."""
        if not self.seen:
            self.receive("text", time.monotonic() + 600)

    def receive(self, wanted: str, deadline: float) -> None:
        ready, _, _ = select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise Silence(f"no {wanted!r} in {self.seen!r}")
        try:
            data = os.read(self.terminal, 4096)
        except OSError:  # the other side is closed
            data = b""
        assert data, f"ended without {wanted!r}: {self.seen!r}"
        self.seen += data.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def type_until(self, text: str, words: str) -> None:
        """Type again each second: a signal between a prompt and the read that follows it waits for that read."""
        for _ in range(600):
            self.type(text)
            try:
                self.expect(words, 1)
                return
            except Silence as silence:
                last = silence
        raise last

    def end(self, number: int) -> int:
        """The exit code after a signal, sent again each second for the same reason."""
        for _ in range(600):
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(1)
        raise AssertionError(f"signal {number} does not end it")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


def _own_terminal():
    """Makes standard input the controlling terminal, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """Never ends an answer by itself: room for 30,000 tokens and no end-of-text token."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    return save_chat_model(folder, max_position_embeddings=32768, eos_token_id=None, num_hidden_layers=1)


@pytest.fixture
def chatting(talkative):
    pytest.importorskip("pty")
    command = [*COMMAND, "chat", talkative, "--max-new-tokens", "30000", "--temperature", "0"]
    terminal = Terminal(*command)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(chatting):
    chatting.expect("> ")
    for question in ("hello", "and again"):
        chatting.type(f"{question}\n")
        chatting.expect(f"{question}\n")
        chatting.expect_anything()  # the answer has begun
        assert chatting.process.poll() is None
        chatting.type("\x03")
        assert "tokens" in chatting.expect("stopped]")
        chatting.expect("> ")
    chatting.type_until("\x03", "(!exit or Ctrl-D to leave)")
    chatting.expect("> ")
    assert chatting.end(signal.SIGTERM) != 0  # at the prompt it ends the program, too


def test_kill_ends_the_program(chatting):
    """Ctrl-C is for the answer, SIGTERM is for the program."""
    chatting.expect("> ")
    chatting.type("hello\n")
    chatting.expect("hello\n")
    chatting.expect_anything()
    assert chatting.end(signal.SIGTERM) != 0
