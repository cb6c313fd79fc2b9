"""An output folder appears whole or not at all, and takes no other's place unasked."""

import errno
from pathlib import Path

import pytest
from folders import contents
from outputs import old_folder, stage

from lowbit.checkpoint.writer import StagedFolder
from lowbit.errors import OutputError, UsageError


def test_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a [b]*" / "out"
    with StagedFolder(target) as staged:
        (staged.path / "config.json").write_text("new")
        assert not target.exists() and staged.path.is_relative_to(target.parent)  # on the same file system
        staged.commit()
    assert contents(target.parent) == {"out": b"", "out/config.json": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_errors_leave_no_output_folder(tmp_path, error):
    with pytest.raises(error), StagedFolder(tmp_path / "out") as staged:
        (staged.path / "config.json").write_text("new")
        raise error
    assert contents(tmp_path) == {}


def test_forgotten_folder_is_removed(tmp_path):
    staged = StagedFolder(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1
    del staged
    assert contents(tmp_path) == {}


def test_existing_folder_is_refused_and_untouched(tmp_path):
    target = old_folder(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="--overwrite"):
        StagedFolder(target)
    assert contents(tmp_path) == before


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    stage(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    target = old_folder(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), StagedFolder(target, overwrite=True) as staged:
        (staged.path / "config.json").write_text("new")
        assert contents(target).keys() == {"config.json", "of the old one"}
        raise RuntimeError
    assert contents(tmp_path) == before
    stage(target, overwrite=True)
    assert contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


@pytest.mark.parametrize("kind", ["folder of photos", "file", "link", "link to nothing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_other_things_files_and_links_are_never_replaced(tmp_path, kind, overwrite):
    target = tmp_path / "out"
    if kind == "folder of photos":
        target.mkdir()
        (target / "photo").write_text("precious")
    elif kind == "file":
        target.write_text("precious")
    elif kind == "link":
        target.symlink_to(old_folder(tmp_path / "elsewhere"))
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path) if kind != "link to nothing" else None
    with pytest.raises(OutputError):
        StagedFolder(target, overwrite)
    assert target.is_symlink() == kind.startswith("link")
    assert before is None or contents(tmp_path) == before


def test_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        StagedFolder(tmp_path / "file" / "out")
    with pytest.raises(OutputError):
        StagedFolder(tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match="runs in"):
        StagedFolder("/")
    with pytest.raises(OutputError):
        StagedFolder("/dev/null/out")
    if Path("/proc/self").exists():  # where no folder can be made, though nothing is in the way
        with pytest.raises(OutputError, match="cannot write to /proc/lowbit"):
            StagedFolder("/proc/lowbit/out")
    assert contents(tmp_path) == {"file": b""}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacement_that_fails_half_way_gives_the_old_folder_back(tmp_path, monkeypatch, error):
    """The old folder is moved aside, then the new one takes its place: nothing may stop between the two."""
    target = old_folder(tmp_path / "out")
    before = contents(tmp_path)
    real, calls = type(tmp_path).rename, []

    def rename(self, to):
        calls.append(self)
        if len(calls) == 2:
            raise error(errno.EIO, "broken") if error is OSError else error
        return real(self, to)

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        stage(target, overwrite=True)
    assert contents(tmp_path) == before


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    """Two runs for one folder, neither with --overwrite: the second to finish must not delete the work of the first."""
    with StagedFolder(tmp_path / "out") as staged:
        (staged.path / "config.json").write_text("second")
        old_folder(tmp_path / "out")
        with pytest.raises(OutputError, match="exists"):
            staged.commit()
    assert contents(tmp_path).keys() == {"out", "out/config.json", "out/of the old one"}


def test_two_at_once_in_one_process_do_not_share_a_folder(tmp_path):
    first = StagedFolder(tmp_path / "one")
    second = StagedFolder(tmp_path / "two")
    assert first.path != second.path
    (first.path / "config.json").write_text("first")
    (second.path / "config.json").write_text("second")
    first.commit()
    second.commit()
    assert (tmp_path / "one" / "config.json").read_text() == "first"
    assert (tmp_path / "two" / "config.json").read_text() == "second"
