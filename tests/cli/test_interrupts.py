"""Runs that are stopped in the middle: Ctrl-C, `kill`, `kill -9`."""

import os
import signal

import pytest
from folders import stored_tensors
from paused import Forked, start_paused

import lowbit

pytestmark = pytest.mark.slow


def start(model, out, again: bool = False) -> Forked:
    """A quantization that has written some tensors of many."""
    return start_paused("quantize", model, "-o", out, "--group-size", 32, method="rtn", call=8, again=again)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("name", "again"), [("SIGINT", True), ("SIGTERM", True), ("SIGHUP", False)])
def test_interrupted(chat_model, tmp_path, name, again):
    """SIGHUP: the terminal or the ssh session was closed. again: an impatient second Ctrl-C, while the first signal
    makes it clean up."""
    process = start(chat_model, tmp_path / "out", again)
    assert list(tmp_path.glob(".out*/*/*.safetensors"))
    process.send_signal(getattr(signal, name))
    out, err = process.communicate()
    lines = err.strip().splitlines()
    assert process.returncode == 1, err
    assert out == "" and lines.pop().startswith("lowbit: interrupted")
    assert set(lines) == ({"Ctrl-C while it cleans up"} if again else set())
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected(cli):
    """`nohup lowbit ...` starts us with SIGHUP ignored, and it has to stay so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli("--version").code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed(chat_model, tmp_path):
    process = start(chat_model, tmp_path / "out")
    process.kill()
    process.communicate()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out")
    lowbit.quantize(chat_model, tmp_path / "out", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(stored_tensors(tmp_path / "out")) > 40
