"""The thread that brings weights into the system's cache."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.system import read_ahead as module
from lowbit.system.read_ahead import read_ahead


@pytest.fixture
def opened(monkeypatch):
    """name -> bytes read of each file that is opened."""
    counts, original = {}, Path.open

    class Counted:
        def __init__(self, path):
            self.path, self.file = path, original(path, "rb", buffering=0)

        def __enter__(self):
            counts[self.path.name] = 0
            return self

        def __exit__(self, *error):
            self.file.close()

        def readinto(self, buffer):
            count = self.file.readinto(buffer)
            counts[self.path.name] += count
            return count

    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: Counted(path))
    monkeypatch.setattr(module, "_CHUNK", 1000)
    return counts


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.safetensors", 2500), ("b.safetensors", 1000), ("c.bin", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def test_weights_are_read_to_the_end_and_once(folder, opened, no_threads):
    read_ahead(folder)
    no_threads("lowbit-read-ahead")
    assert opened == {"a.safetensors": 2500, "b.safetensors": 1000}
    opened.clear()
    read_ahead(folder)
    no_threads("lowbit-read-ahead")
    assert not opened


def test_files_larger_than_memory_are_not_read_ahead(folder, opened, no_threads, monkeypatch):
    monkeypatch.setattr(module, "_room", lambda: 3499)
    read_ahead(folder)
    no_threads("lowbit-read-ahead")
    assert not opened


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_missing_files_are_no_error_of_read_ahead(tmp_path, no_threads):
    read_ahead(tmp_path / "missing")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "blob")
    read_ahead(tmp_path)
    no_threads("lowbit-read-ahead")


@pytest.mark.parametrize(("command", "options"), [("chat", []), ("generate", ["--prompt", "x"])])
def test_commands_read_ahead_before_they_import_torch(command, options):
    code = (
        f"import sys; from lowbit.cli.commands.running import {command} as module\n"
        "from lowbit.cli.group import load_command\n"
        "module.read_ahead = lambda folder: sys.exit(f'{folder}, torch: {\"torch\" in sys.modules}')\n"
        f"load_command({command!r}).main(['some/folder', *{options!r}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stderr.strip() == f"{Path('some/folder')}, torch: False"
