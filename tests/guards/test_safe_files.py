"""Writing, locking and removing in folders of strangers, where any name may be a link."""

import os
import shutil

import pytest
from folders import contents, precious

from lowbit.errors import OutputError
from lowbit.guards import safe_files
from lowbit.guards.safe_files import (
    claim,
    create,
    make_private,
    open_existing,
    refuse_links,
    remove,
    remove_claimed,
    write_whole,
)


@pytest.fixture
def victim(tmp_path):
    """A folder beside `here`, which must stay as it is."""
    with precious(tmp_path / "victim") as folder:
        yield folder


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


# Files


@pytest.mark.parametrize("to", ["../victim/a", "../victim/new"], ids=["file", "nothing"])
def test_a_link_is_replaced_and_not_followed(here, victim, to):
    (here / "x.json").symlink_to(to)
    write_whole(here / "x.json", "new")
    assert not (here / "x.json").is_symlink() and contents(here) == {"x.json": b"new"}


def test_a_hard_link_is_replaced(here, victim):
    os.link(victim / "a", here / "x.json")
    write_whole(here / "x.json", b"new")
    assert contents(here) == {"x.json": b"new"}


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "pipe", "device", "standard output"])
def test_folders_pipes_and_links_are_not_replaced(here, victim, kind):
    path = here / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        to = {"link to a folder": victim, "device": os.devnull, "standard output": "/proc/self/fd/1"}[kind]
        path.symlink_to(to)
    status = path.lstat()
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: it exists and is not a regular file"):
        write_whole(path, "new")
    assert path.lstat() == status and names(here) == ["x.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_file_that_cannot_be_written_stays_what_it_was(here, monkeypatch, failing, error):
    (here / "x.json").write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_whole(here / "x.json", "new", durable=True)
    assert contents(here) == {"x.json": b"old"}


@pytest.mark.parametrize("name", ["no/such/folder", "x" * 300, "x\0", ""])
def test_names_that_cannot_be(here, name):
    with pytest.raises(OutputError, match="cannot write"):
        write_whole(here / name, "new")
    assert names(here) == []


def test_text_that_cannot_be_encoded(here):
    with pytest.raises(OutputError, match="surrogates"):
        write_whole(here / "x", "\ud800")
    assert names(here) == []


def test_new_files_have_the_mode_that_the_umask_leaves(here):
    before = os.umask(0o027)
    try:
        write_whole(here / "x", "")
    finally:
        os.umask(before)
    assert (here / "x").stat().st_mode & 0o777 == 0o640


def test_a_file_is_made_only_where_nothing_is(here, victim):
    (here / "dangling").symlink_to(victim / "new")
    (here / "link").symlink_to(victim / "a")
    (here / "file").write_text("")
    for name in ("dangling", "link", "file"):
        with pytest.raises(FileExistsError):
            create(here / name)


def test_a_file_is_changed_in_place_only_if_it_is_there_and_no_link(here, victim):
    (here / "link").symlink_to(victim / "a")
    for name in ("link", "nothing"):
        with pytest.raises(OSError):
            open_existing(here / name)
    (here / "file").write_text("abc")
    with open_existing(here / "file") as file:
        file.write(b"x")
    assert (here / "file").read_text() == "xbc"


def test_removing_never_enters_a_link(here, victim):
    (here / "folder" / "deep").mkdir(parents=True)
    (here / "folder" / "deep" / "link").symlink_to(victim)
    (here / "folder" / "file").write_text("")
    (here / "link").symlink_to(victim)
    (here / "dangling").symlink_to("nowhere")
    os.mkfifo(here / "pipe")
    for name in (*names(here), "nothing"):
        remove(here / name)
    assert names(here) == []


# Folders with a lock


def test_a_folder_is_claimed_once(here):
    first = claim(here / "job")
    assert claim(here / "job") is None
    first.close()
    second = claim(here / "job")
    remove_claimed(here / "job", second)
    assert second.closed and names(here) == []
    with pytest.raises(FileNotFoundError):
        claim(here / "job", make=False)


@pytest.mark.parametrize("to", ["../victim", "nowhere", "../victim/a"])
def test_a_link_is_not_claimed(here, victim, to):
    (here / "job").symlink_to(to)
    for make in (True, False):
        with pytest.raises(
            OutputError, match=r"job is a link; expected a folder that lowbit made: remove it"
        ) as refusal:
            claim(here / "job", make=make)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_not_opened(here, victim, kind):
    lock = here / "job" / ".lock"
    lock.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim / ("a" if kind == "link" else "new"))
    with pytest.raises(OSError):
        claim(here / "job")


def test_a_lock_keeps_what_is_in_its_file(here):
    (here / "job").mkdir()
    (here / "job" / ".lock").write_text("precious")
    claim(here / "job").close()
    assert (here / "job" / ".lock").read_text() == "precious"


def test_a_folder_of_another_user_is_refused(here, monkeypatch):
    """Unless the folder it is in is theirs too: as root in the folder of a user."""
    (here / "job").mkdir()
    monkeypatch.setattr(safe_files, "_user", lambda: os.geteuid() + 1)
    claim(here / "job").close()
    real = type(here).stat
    monkeypatch.setattr(type(here), "stat", lambda self, **_: os.stat_result((0,) * 10) if self == here else real(self))
    monkeypatch.setattr(safe_files, "_user", lambda: 12345)
    if os.geteuid() == 0:
        os.chown(here / "job", 54321, 54321)
    with pytest.raises(OutputError, match="belongs to another user"):
        claim(here / "job")


@pytest.mark.parametrize("moment", ["before it is locked", "before it is opened"])
def test_a_folder_that_its_owner_removes_meanwhile_is_made_anew(here, monkeypatch, moment):
    """A lock on a file that is gone would be held by two at once."""
    name = {"before it is locked": "try_lock", "before it is opened": "open_lock"}[moment]
    real, removed = getattr(safe_files, name), []

    def late(argument):
        if not removed:
            removed.append(shutil.rmtree(here / "job"))
        return real(argument)

    monkeypatch.setattr(safe_files, name, late)
    lock = claim(here / "job")
    assert removed and os.path.samestat(os.fstat(lock.fileno()), (here / "job" / ".lock").stat())
    assert claim(here / "job") is None
    lock.close()
    removed.clear()
    with pytest.raises(FileNotFoundError):
        claim(here / "job", make=False)


def test_the_lock_goes_last(here, monkeypatch):
    lock, removed = claim(here / "job"), []
    for name in ("b", "state", "zzz", "a"):
        (here / "job" / name).write_text("")
    real = safe_files.remove
    monkeypatch.setattr(safe_files, "remove", lambda path: (removed.append(path.name), real(path)))
    remove_claimed(here / "job", lock, last=("a", "state"))
    assert sorted(removed[:2]) == ["b", "zzz"] and removed[2:] == ["a", "state", ".lock"]
    assert names(here) == []


def test_file_systems_without_locks(here, monkeypatch):
    """A run goes on there, but nothing is taken for a leftover of a dead one."""
    monkeypatch.setattr(safe_files, "try_lock", lambda file: None)
    claim(here / "job").close()
    assert claim(here / "job", sure=True) is None


@pytest.mark.parametrize("name", ["link", "deep/link", "deep/pipe"])
def test_links_in_a_folder_of_ours_are_refused(here, victim, name):
    (here / "job" / "deep").mkdir(parents=True)
    (here / "job" / "deep" / "file").write_text("")
    refuse_links(here / "job")
    if name.endswith("pipe"):
        os.mkfifo(here / "job" / name)
    else:
        (here / "job" / name).symlink_to(victim)
    with pytest.raises(OutputError, match=f"{name} is .*remove .*job, then run again"):
        refuse_links(here / "job")


# Code that is kept in a file


def test_folders_for_nobody_else_whatever_the_umask(here):
    before = os.umask(0)
    try:
        make_private(here / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (here / "a", here / "a" / "b", here / "a" / "b" / "c")] == [
        0o700
    ] * 3
