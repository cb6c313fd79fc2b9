"""lowbit serve: where it listens, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest
from folders import ROOT
from served import LONG, SECONDS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
COMMAND = [sys.executable, "-m", "lowbit", "serve"]


@contextmanager
def started(*arguments):
    """(the process, its address) once it listens."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0"], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def completion(address, **given):
    body = json.dumps({"prompt": "the quick", **given}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_what_runs_come_to_its_end(folder, number):
    with started(folder) as (process, address), completion(address, max_tokens=300, stream=True) as answer:
        answer.readline()
        process.send_signal(number)
        pieces = [json.loads(line[6:]) for line in answer.read().splitlines() if line.startswith(b"data: ")]
        assert pieces[-1]["usage"]["completion_tokens"] == 300
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0 and out == "" and err == "the server has ended\n"


@pytest.mark.slow
def test_a_second_signal_does_not_wait(folder):
    with started(folder, "--max-tokens", LONG) as (process, address):
        with completion(address, max_tokens=LONG - 100, stream=True) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            with pytest.raises(OSError):
                while True:  # until it takes nobody in any more: two signals at once would be one
                    urllib.request.urlopen(f"{address}/health", timeout=SECONDS).close()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)  # it would wait for a minute
        assert "Traceback" not in err


def test_what_cannot_be_is_one_line(folder, capfd, monkeypatch):
    from lowbit.cli.main import main

    monkeypatch.delenv("LOWBIT_API_KEY", raising=False)
    for arguments, code, words in (
        (["--host", "0.0.0.0"], 2, "others can reach 0.0.0.0: pass --api-key"),
        (["--cb-num-blocks", "4"], 2, "--cb-num-blocks is a size of --continuous-batching"),
        (["--continuous-batching", "--kv-cache", "int8"], 2, "--kv-cache int8 does not go with"),
        (["--kv-cache", "int3"], 2, "kv-cache is 'int3'"),
        (["--port", "70000"], 2, "less than or equal to 65535"),
    ):
        monkeypatch.setattr(sys, "argv", ["lowbit", "serve", str(folder), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code == code and words in err and out == "" and "Traceback" not in err


def test_without_the_packages_it_says_what_to_install(folder, capfd, monkeypatch):
    from lowbit.cli.main import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["lowbit", "serve", str(folder)])
    with pytest.raises(SystemExit):
        main()
    assert "serving needs uvicorn: pip install 'lowbit[serve]'" in capfd.readouterr().err
