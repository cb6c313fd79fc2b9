"""Every file that lowbit makes, replaces, locks or removes goes through this module.

Folders come from strangers: a clone, an archive, a shared /tmp. Any name in them may be a link, also a name that lowbit
would choose itself. Therefore a file is made anew under a name that nobody knows and renamed into place (a rename
replaces a link, it does not follow one), a file that has to stay is opened without following or truncating it, and
removing takes a link away without entering it. tests/test_layers.py forbids every other way to write and to remove.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lowbit.errors import OutputError, UsageError

# Opening for writing never follows a link and never waits for the other end of a pipe
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LOCK_NAME = ".lock"


# Files


def create(path: Path, mode: int = 0o666) -> int:
    """Make a new file. Returns its descriptor, for writing. Raises FileExistsError for anything there, also a link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFULLY, mode)


def open_existing(path: Path):
    """Open a file to change it where it is: binary, unbuffered. It is neither made nor truncated, a link is refused."""
    return os.fdopen(os.open(path, os.O_WRONLY | _CAREFULLY), "wb", buffering=0)


def write_whole(path: Path, data: str | bytes, *, durable: bool = False) -> None:
    """Write or replace a file, all of it or nothing. A link is replaced, what it leads to is not touched.

    Args:
        path: the file. What is there and is no regular file (a folder, a pipe, a device) is refused.
        data: its content; text is encoded as UTF-8.
        durable: whether it must be on the disk before the old one is gone, as for a state that a run goes on from.

    Raises:
        OutputError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    try:
        aside = path.with_name(f".lowbit-{secrets.token_hex(8)}.partial")
        content = data.encode() if isinstance(data, str) else data
        _refuse_special(path)
        try:
            with os.fdopen(create(aside), "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            remove(aside)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name or a text that cannot be encoded
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _refuse_special(path: Path) -> None:
    try:
        special = not stat.S_ISREG(path.stat().st_mode)
        # /dev/stdout leads to a regular file where the output of a command goes to one
        special = special or (path.is_symlink() and os.readlink(path).startswith("/proc/"))
    except FileNotFoundError:
        return
    if special:
        raise OSError(0, "it exists and is not a regular file")


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one. Raises OSError, FileExistsError if `target` is there."""
    with source.open("rb") as opened, os.fdopen(create(target), "wb") as made:
        shutil.copyfileobj(opened, made, 2**20)


def link(path: Path, target: Path) -> None:
    """Make a link to a file. Raises OSError, FileExistsError for anything there."""
    path.symlink_to(target)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it. What cannot be removed stays."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:
        pass


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders in this order, up to the first that is not empty."""

    def end() -> None:
        for folder in folders:
            with suppress(FileNotFoundError):
                folder.rmdir()

    with suppress(OSError):
        _although_interrupted(end)


# Hidden folders of a run, with a lock in each


def try_lock(file) -> bool | None:
    """Lock an open file for as long as it is open: whether that worked, None where the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, and nothing is left in the folder. Where folders cannot be locked, all go on at once."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_lock(path: Path):
    """Open the file that a lock is held on, or make it. Raises OSError for a link and for what is no regular file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CAREFULLY, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "r+b", buffering=0)


def claim(folder: Path, *, make: bool = True, sure: bool = False):
    """Lock a hidden folder of a run, for as long as the returned file is open. `remove_claimed` ends both.

    The folder may be removed by its owner at any moment until it is locked: what counts is a lock on the file that is
    in it afterwards.

    Args:
        folder: a folder of lowbit's own, beside an output.
        make: whether to make the folder if it is not there.
        sure: whether to give up, too, where the file system has no locks.

    Returns:
        The open lock file, None if another process holds the lock.

    Raises:
        OutputError: `folder` is a link, or belongs to somebody else.
        OSError: it cannot be made or locked; FileNotFoundError if it is not there and not to be made.
    """
    while True:
        lock = None
        try:
            if make and not os.path.lexists(folder):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                _check_own(folder)
                lock = open_lock(folder / LOCK_NAME)
            except FileNotFoundError:
                if not make:
                    raise
                continue  # it was removed in between
            locked = try_lock(lock)
            if locked is False or (sure and not locked):
                lock.close()
                return None
            if _is_at(lock, folder / LOCK_NAME):
                return lock
            lock.close()
        except BaseException:  # Ctrl-C, or a full disk
            if lock is not None:
                lock.close()
            if make:
                remove_empty([folder])
            raise


def remove_claimed(folder: Path, lock, last: Sequence[str] = ()) -> None:
    """Remove a folder that `claim` has locked, and close the lock.

    The names in `last` go in this order when all else is gone, the lock after them: as long as something is left,
    nobody else can claim the folder, and a process that is killed in between leaves what says how far it was.
    """
    order = (*last, LOCK_NAME)

    def end() -> None:
        if _is_at(lock, folder / LOCK_NAME):
            for entry in sorted(folder.iterdir(), key=lambda e: order.index(e.name) if e.name in order else -1):
                remove(entry)
        remove_empty([folder])

    with lock, suppress(OSError):
        _although_interrupted(end)


def _although_interrupted(action: Callable[[], None]) -> None:
    """Ctrl-C while something is cleaned up: it is done again, then the interruption goes on."""
    try:
        action()
    except BaseException:
        action()
        raise


def refuse_links(folder: Path) -> None:
    """Raise OutputError unless `folder` is a real folder that holds nothing but files and folders."""
    _check_own(folder)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # its owner is at work
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                what = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise OutputError(f"{path} is {what}, which lowbit never makes there: remove {folder}, then run again")


def _check_own(folder: Path) -> None:
    """Whoever owns the folder that `folder` is in could exchange it in any case; nobody else may own it but us."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise OutputError(f"{folder} is {what}; expected a folder that lowbit made: remove it, then run again")
    if status.st_uid not in (_user(), folder.parent.stat().st_uid):
        raise OutputError(f"{folder} belongs to another user (uid {status.st_uid}): choose another output folder")


def _is_at(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0  # Windows has no owners: all are 0 there


# Code that is kept in a file


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for nobody but this user whatever the umask says."""
    for missing in [parent for parent in (*reversed(folder.parents), folder) if not parent.exists()]:
        missing.mkdir(mode=0o700, exist_ok=True)


def distrust(path: Path) -> str | None:
    """Why somebody else may have put there what is at `path`, or None. As ssh looks at its keys: it is no link, nobody
    but us and root owns it or a folder above it, nobody else may write to it, or exchange a folder above it."""
    path = Path(os.path.abspath(path))
    if path.is_symlink():
        return f"{path} is a link"
    # with links on the way there are two chains of folders: that of the names, and that of what they lead to
    for place in (path, *sorted({*path.parents, *path.resolve().parents}, reverse=True)):
        status = place.lstat()
        if status.st_uid not in (_user(), 0):
            return f"{place} belongs to another user (uid {status.st_uid})"
        open_to_others = bool(status.st_mode & 0o022) if place == path else _others_may_exchange(status)
        if open_to_others:
            return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _others_may_exchange(status: os.stat_result) -> bool:
    """Whether others may rename what is in a folder. In a sticky one, as /tmp, they may only rename their own."""
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & 0o022 or status.st_mode & stat.S_ISVTX:
        return False
    return bool(status.st_mode & 0o002) or not _is_only_ours(status.st_gid)


def _is_only_ours(group: int) -> bool:
    """Whether this is the group that many systems give every user, with nobody else in it."""
    try:
        import grp
        import pwd

        name, found = pwd.getpwuid(_user()).pw_name, grp.getgrgid(group)
        return found.gr_name == name and set(found.gr_mem) <= {name}
    except (ImportError, KeyError):
        return False


def refuse_where_we_are(folder: Path) -> None:
    """Raise UsageError for a folder that this process runs in: another one takes its place, and a shell, or Python,
    would be left in one that is no more."""
    try:
        here = Path.cwd()
    except OSError:  # it is no more already
        return
    if here.is_relative_to(os.path.realpath(folder)):
        raise UsageError(f"the output folder {folder} is the one this command runs in: choose one inside of it")
