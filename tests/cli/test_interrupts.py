"""Runs that are stopped in the middle: Ctrl-C, `kill`, `kill -9`."""

import os
import signal
import subprocess
import sys
import time

import pytest
from folders import ROOT, save_random_llama, stored_tensors

import lowbit

COMMAND = [sys.executable, "-m", "lowbit"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """60 MB, many times what --scale-search mse does in a second."""
    return save_random_llama(tmp_path_factory.mktemp("slow") / "model", 1024, 2048, 3)


@pytest.fixture
def running(slow, tmp_path):
    """A quantization that has begun to write to tmp_path / out."""
    command = [*COMMAND, "quantize", slow, "-o", tmp_path / "out", "--scale-search", "mse"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob(".out*/*/*.safetensors")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None, process.stderr.read()
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted(running, tmp_path, number):
    """SIGHUP: the terminal or the ssh session was closed."""
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 1, err
    assert out == "" and len(err.strip().splitlines()) == 1 and err.strip().startswith("lowbit: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected(cli):
    """`nohup lowbit ...` starts us with SIGHUP ignored, and it has to stay so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli("--version").code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_twice(running, tmp_path):
    """An impatient second Ctrl-C, while the first one cleans up."""
    for _ in range(3):
        running.send_signal(signal.SIGINT)
        time.sleep(0.005)
    _, err = running.communicate(timeout=30)
    assert running.returncode != 0 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_killed(running, slow, tmp_path):
    running.kill()
    running.wait()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out")
    lowbit.quantize(slow, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(stored_tensors(tmp_path / "out")) > 40
