"""What runs that were killed have left is removed by the next one, what a live one is at work on is not."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from folders import contents
from outputs import old_folder, stage

from lowbit.checkpoint.writer import StagedFolder
from lowbit.errors import OutputError
from lowbit.guards import safe_files


def in_child(action) -> int:
    """Run `action` in a forked process that ends like one that is killed: no cleanup of any kind."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def leave_behind(target) -> None:
    staged = StagedFolder(target, overwrite=True)
    (staged.path / "config.json").write_text("half-made")
    os._exit(0)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    target = tmp_path / "out"
    os.waitpid(in_child(lambda: leave_behind(target)), 0)
    assert len(list(tmp_path.iterdir())) == 1 and not target.exists()
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / ".out.partial-notes").mkdir()
    stage(target)
    assert contents(tmp_path).keys() == {"out", "out/config.json", ".other.partial-1", ".out.partial-notes"}


def test_leftover_whose_process_number_is_ours_now(tmp_path):
    """In containers every run has the same process number, so the one that was killed had ours."""
    target = tmp_path / "out"
    os.waitpid(in_child(lambda: leave_behind(target)), 0)
    (leftover,) = tmp_path.iterdir()
    leftover.rename(tmp_path / f".out.partial-{os.getpid()}")
    stage(target)
    assert contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


def test_process_that_was_killed_between_the_two_renames(tmp_path, monkeypatch):
    """The next run finds the old folder aside: it is neither lost nor left there for ever."""
    target = old_folder(tmp_path / "out")

    def killed():
        real, calls = os.rename, []
        type(tmp_path).rename = lambda self, to: os._exit(0) if calls else (calls.append(1), real(self, to))
        stage(target, overwrite=True)

    os.waitpid(in_child(killed), 0)
    assert not target.exists()
    stage(target, overwrite=True)
    assert contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["on this machine", "in another container"])
def test_folder_of_a_live_process_is_left_alone(tmp_path, elsewhere):
    """In another container that shares the volume, its process number means nothing here: no process has it."""
    target = tmp_path / "out"
    begun, tell = os.pipe()

    def work():
        staged = StagedFolder(target)
        (staged.path / "config.json").write_text("theirs")
        os.write(tell, b".")
        signal.pause()

    child = in_child(work)
    os.close(tell)
    try:
        assert os.read(begun, 1) == b"."
        os.close(begun)
        (theirs,) = tmp_path.iterdir()
        if elsewhere:
            theirs = theirs.rename(tmp_path / ".out.partial-99999999")
        before = contents(theirs)
        stage(target)
        assert contents(theirs) == before and len(list(tmp_path.iterdir())) == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_old_output_that_is_being_removed_never_comes_back(tmp_path, monkeypatch):
    """Killed while it removes the old one; then the new one is moved elsewhere."""
    target = old_folder(tmp_path / "out")

    def killed():
        shutil.rmtree = lambda path, **_: (os.unlink(path / "config.json"), os._exit(0))
        stage(target, overwrite=True)

    os.waitpid(in_child(killed), 0)
    target.rename(tmp_path / "elsewhere")
    with StagedFolder(target):
        assert not target.exists()
    assert contents(tmp_path) == {"elsewhere": b"", "elsewhere/config.json": b"new"}


@pytest.mark.parametrize("name", ["", "/.lock", "/old", "/new"])
def test_leftovers_with_links_in_them_lead_nowhere(tmp_path, name):
    """An archive may hold what looks like the folder of a run that was killed."""
    victim = old_folder(tmp_path / "victim")
    before = contents(victim)
    leftover = tmp_path / ".out.partial-5"
    if name:
        for folder in ("", "new", "old"):
            (leftover / folder).mkdir(exist_ok=True)
        shutil.rmtree(f"{leftover}{name}", ignore_errors=True)
    Path(f"{leftover}{name}").symlink_to(victim / "config.json" if name == "/.lock" else victim)
    stage(tmp_path / "out")
    assert contents(victim) == before and contents(tmp_path / "out") == {"config.json": b"new"}
    assert not (tmp_path / "out").is_symlink() and (name == "/.lock" or not os.path.lexists(leftover))


def test_a_leftover_is_left_alone_where_there_are_no_locks(tmp_path, monkeypatch):
    """It may be the folder of a run that is alive."""
    monkeypatch.setattr(safe_files, "try_lock", lambda file: None)
    with StagedFolder(tmp_path / "out") as first:
        stage(tmp_path / "out")
        assert first.path.is_dir()
    assert contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


def test_the_unfinished_output_goes_before_the_old_one(tmp_path, monkeypatch):
    """Of a run that was killed between the renames, when somebody else has made the output since: the next one may be
    killed while it removes both, and an old output of which a part is left must not come back."""
    target, leftover = tmp_path / "out", tmp_path / ".out.partial-5"
    for folder in ("new", "old"):
        (leftover / folder).mkdir(parents=True)
    old_folder(target)
    real, removed = safe_files.remove, []
    monkeypatch.setattr(safe_files, "remove", lambda path: (removed.append(path.name), real(path)))
    with pytest.raises(OutputError, match="exists already"):
        StagedFolder(target)
    assert removed == ["new", "old", ".lock"] and not leftover.exists()
