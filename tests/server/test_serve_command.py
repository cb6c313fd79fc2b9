"""lowbit serve: where it listens, and how it ends."""

import json
import os
import re
import signal
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import free_port, start
from served import LONG, SECONDS


def command(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """`lowbit serve` in this process, one that is forked, with its output in files."""
    from lowbit.cli.main import main
    from lowbit.server import run

    run._SECONDS_TO_END = 10 * SECONDS  # whoever waits for that does not leave within any test
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["lowbit", "serve", *arguments]
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code or 0)


@dataclass
class Command:
    """A server that runs: its process, and the folder with what it has printed."""

    process: object
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        path = self.folder / "err"
        return path.read_text() if path.exists() else ""

    @property
    def address(self) -> str:
        """Once it listens."""
        until(lambda: "/v1" in self.err and "\n" in self.err, self)
        return re.search(r"(http://127\.0\.0\.1:\d+)/v1", self.err)[1]

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ended(self) -> int:
        """The exit code, once it has one."""
        self.process.join(SECONDS)
        assert not self.process.is_alive()
        return self.process.exitcode


def until(holds, server: Command) -> None:
    end = time.monotonic() + SECONDS  # only keeps a hang from lasting for ever
    while not holds():
        assert server.process.is_alive() and time.monotonic() < end, server.err
        time.sleep(0.02)


@contextmanager
def started(folder: Path, *arguments, **environment):
    """A server; its files are in `folder`."""
    folder.mkdir()
    process = start(command, [*map(str, arguments), "--port", "0"], folder, environment)
    server = Command(process, folder)
    try:
        yield server
    finally:
        process.kill()
        process.join()


def completion(address, **given):
    body = json.dumps({"prompt": "the quick", **given}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_what_runs_come_to_its_end(folder, number, tmp_path):
    with started(tmp_path / "s", folder) as server, completion(server.address, max_tokens=60, stream=True) as answer:
        answer.readline()
        server.send(number)
        pieces = [json.loads(line[6:]) for line in answer.read().splitlines() if line.startswith(b"data: ")]
        assert pieces[-1]["usage"]["completion_tokens"] == 60
        assert server.ended() == 0 and server.out == ""
        assert server.err.splitlines()[1:] == ["the server has ended"]


@pytest.mark.slow
def test_a_second_signal_does_not_wait(folder, tmp_path):
    """The first one would wait for an answer that takes longer than this test may."""
    with started(tmp_path / "s", folder, "--max-tokens", LONG) as server:
        with completion(address := server.address, max_tokens=LONG - 100, stream=True) as answer:
            answer.readline()
            server.send(signal.SIGINT)
            with pytest.raises(OSError):
                while True:  # until it takes nobody in any more: two signals at once would be one
                    urllib.request.urlopen(f"{address}/health", timeout=SECONDS).close()
            server.send(signal.SIGINT)
            server.ended()
        assert "Traceback" not in server.err


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("--slots", 1, "--context", LONG), ("--slots", 0)], ids=["in a slot", "alone"])
def test_a_client_that_is_killed_leaves_the_server_alive(folder, sizes, tmp_path):
    """And its answer stops: the next one, which has to be alone, does not wait for it."""
    with started(tmp_path / "s", folder, "--max-tokens", LONG, *sizes) as server:
        client = start(_reader, server.address, tmp_path / "reads")
        until((tmp_path / "reads").exists, server)
        client.kill()
        client.join()
        with completion(server.address, max_tokens=3) as answer:  # would take minutes behind the other
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        server.send(signal.SIGTERM)
        assert server.ended() == 0 and server.err.splitlines()[1:] == ["the server has ended"]


def _reader(address: str, told: Path) -> None:
    """A client that reads on, for as long as it lives."""
    with completion(address, max_tokens=LONG - 100, stream=True) as answer:
        answer.readline()
        told.touch()
        while answer.readline():
            pass


@pytest.mark.slow
def test_it_listens_where_it_was_told_to(folder, tmp_path):
    with started(tmp_path / "s", folder) as server:
        port = int(server.address.rpartition(":")[2])
        assert listening(server.process.pid) == {("0100007F", port)}


def listening(pid: int) -> set[tuple[str, int]]:
    """(address in hexadecimal, port) of the TCP sockets on which a process listens."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:["):
            mine.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in mine:
                address, port = words[1].split(":")
                found.add((address, int(port, 16)))
    return found


@contextmanager
def together(folder: Path, *arguments):
    """Two processes that share a model, as torchrun starts them: the one that listens, and the other."""
    folder.mkdir()
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        started(folder / "1", *arguments, RANK="1", LOCAL_RANK="1", **ranks) as second,
        started(folder / "0", *arguments, RANK="0", LOCAL_RANK="0", **ranks) as first,
    ):
        yield first, second


@pytest.mark.slow
def test_two_processes_serve_a_model(folder, tmp_path):
    """They answer as one does; the first one listens, and ends both."""
    with started(tmp_path / "alone", folder) as alone, completion(alone.address, max_tokens=8, seed=3) as answer:
        expected = json.load(answer)["choices"][0]["text"]
    with together(tmp_path / "two", folder) as (first, second):
        for _ in range(2):
            with completion(first.address, max_tokens=8, seed=3) as answer:
                assert json.load(answer)["choices"][0]["text"] == expected
        with completion(first.address, max_tokens=40, stream=True) as answer:
            answer.readline()  # and leaves
        for server in (second, first):  # torchrun hands a signal to all
            server.send(signal.SIGTERM)
        assert (first.ended(), second.ended()) == (0, 0)
        assert first.err.splitlines()[1:] == ["the server has ended"] and second.err == ""


@pytest.mark.slow
def test_a_killed_process_ends_the_other_in_one_line(folder, tmp_path):
    gone = "lowbit: error: another process of this run has ended: what it printed says why, nothing if it was killed"
    with together(tmp_path / "a", folder) as (first, second):
        assert first.address
        first.process.kill()
        assert second.ended() == 1 and second.err.splitlines() == [gone]
    with together(tmp_path / "b", folder) as (first, second):
        address = first.address
        second.process.kill()
        second.process.join()
        with pytest.raises(OSError):
            completion(address, max_tokens=8)
        assert first.ended() == 1 and first.err.splitlines()[-1] == gone


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
