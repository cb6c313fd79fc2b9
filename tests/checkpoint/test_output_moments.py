"""Another run, or Ctrl-C, at any moment of a run: the old output or the new one, whole, and nothing beside it."""

import gc
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from folders import contents
from outputs import old_folder, stage

from lowbit.checkpoint.writer import StagedFolder
from lowbit.errors import OutputError
from lowbit.guards import safe_files

MOMENTS = ["Path.mkdir", "Path.rename", "Path.rmdir", "open_lock", "try_lock", "_is_at", "remove", "remove_claimed"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_another_run_that_starts_meanwhile_takes_nothing_away(tmp_path, monkeypatch, moment, when, overwrite):
    """It starts, and ends, whenever the first run calls this function: what it removes must be nobody's."""
    target, others = tmp_path / "out", []
    if overwrite:
        old_folder(target)
    where = type(tmp_path) if moment.startswith("Path.") else safe_files
    name = moment.removeprefix("Path.")
    real = getattr(where, name)

    def beside() -> None:
        if len(others) == 20:  # every time would be for ever: a folder that is removed before it is locked is made anew
            return
        with monkeypatch.context() as alone:
            alone.setattr(where, name, real)
            others.append(moment)
            with suppress(OutputError):  # the output is there already
                StagedFolder(target, overwrite).discard()

    def hooked(*args, **kwargs):
        if when == "before":
            beside()
        try:
            return real(*args, **kwargs)
        finally:
            if when == "after":
                beside()

    monkeypatch.setattr(where, name, hooked)
    stage(target, overwrite)
    monkeypatch.undo()
    assert others and contents(tmp_path) == {"out": b"", "out/config.json": b"new"}


# What changes something
CHANGING = [
    (Path, "mkdir"), (Path, "rename"), (Path, "rmdir"), (Path, "unlink"), (shutil, "rmtree"), (safe_files, "open_lock"),
    (safe_files, "try_lock"), (safe_files, "_is_at"),
]  # fmt: skip


def interrupt_at(monkeypatch, number: int) -> list[str]:
    """Ctrl-C before (even numbers) or after a call of one of CHANGING. Returns the names of the calls so far."""
    calls = []

    def moment(name) -> None:
        calls.append(name)
        if len(calls) == number + 1:
            raise KeyboardInterrupt

    def hooked(name, real):
        def call(*args, **kwargs):
            moment(name)
            value = real(*args, **kwargs)
            moment(name)
            return value

        return call

    for owner, name in CHANGING:
        monkeypatch.setattr(owner, name, hooked(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_at_any_call(tmp_path, overwrite):
    """The old output or the new one, whole, and nothing beside it."""
    new = {"deep": b"", "deep/out": b"", "deep/out/config.json": b"new"}
    interrupted, number = True, 0
    while interrupted:
        parent = tmp_path / str(number)
        parent.mkdir()
        if overwrite:
            (parent / "deep").mkdir()
            old_folder(parent / "deep" / "out")
        before = contents(parent)
        with pytest.MonkeyPatch.context() as patched:
            calls = interrupt_at(patched, number)
            try:
                stage(parent / "deep" / "out", overwrite)
                interrupted = False
            except KeyboardInterrupt:
                gc.collect()
        assert contents(parent) in ((before, new) if interrupted else (new,)), calls[: number + 1]
        number += 1
    assert number > 15
