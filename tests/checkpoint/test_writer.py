"""Shards written at planned offsets, and output folders that appear whole or not at all."""

import errno
import gc
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from folders import contents, read_json, same_bits, stored_tensors
from safetensors import safe_open
from safetensors.torch import load_file

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.layout import DTYPES
from lowbit.checkpoint.writer import StagedFolder, parse_size
from lowbit.errors import LowbitError, OutputError, UsageError
from lowbit.guards import safe_files

INDEX = "model.safetensors.index.json"


def random_tensor(dtype: torch.dtype, shape) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).to(dtype)
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)


def infos_of(tensors) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(folder, tensors, max_shard_size=10**9, order=None, total_parameters=0):
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, infos_of(tensors), max_shard_size, {}) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
        writer.finish(total_parameters)
    return writer


def test_the_package_reads_every_dtype_and_shape(tmp_path):
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (2, 3, 4)]
    tensors = {f"{name}.{i}": random_tensor(d, s) for name, d in DTYPES.items() for i, s in enumerate(shapes)}
    write_all(tmp_path, tensors, order=sorted(tensors, key=hash))  # in any order
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / INDEX).exists()


def test_views_are_written_by_their_values(tmp_path):
    base = torch.arange(24).view(4, 6)
    tensors = {"transposed": base.T, "strided": base[::2, 1::2], "expanded": base[:1].expand(3, 6)}
    write_all(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(loaded[name], tensors[name].contiguous()) for name in tensors)


def test_shards(tmp_path):
    tensors = {f"t{i}": random_tensor(torch.float32, (count,)) for i, count in enumerate([10, 10, 5, 100, 1, 24, 1])}
    writer = write_all(tmp_path, tensors, 100, total_parameters=151)
    index = read_json(tmp_path / INDEX)
    # 40+40, 20 | 400 is larger than the limit and gets a file of its own | 4+96 fills one exactly | 4
    grouped = {}
    for name, file in index["weight_map"].items():
        grouped.setdefault(file, []).append(name)
    assert [sorted(names) for _, names in sorted(grouped.items())] == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"], ["t6"]]
    assert sorted(grouped) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(contents(tmp_path)) == sorted([*grouped, INDEX])
    for file, names in grouped.items():
        assert load_file(tmp_path / file).keys() == set(names)
    assert index["metadata"] == {"total_size": 604, "total_parameters": 151}
    assert writer.total_size == sum(t.nbytes for t in stored_tensors(tmp_path).values()) == 604
    assert all(same_bits(tensor, tensors[name]) for name, tensor in stored_tensors(tmp_path).items())


def test_index_agrees_with_the_one_of_transformers(tmp_path):
    """What transformers writes and what we write of the same tensors have the same keys and totals."""
    from models import save_tiny

    theirs = save_tiny(tmp_path / "theirs", max_shard_size="60KB")
    reader = CheckpointReader(theirs)
    tensors = {name: reader.tensor(name) for name in reader.tensors}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    write_all(tmp_path / "ours", tensors, parse_size("60KB"), total_parameters=parameters)
    expected, actual = read_json(theirs / INDEX), read_json(tmp_path / "ours" / INDEX)
    assert actual["metadata"] == expected["metadata"]
    assert actual["weight_map"].keys() == expected["weight_map"].keys()


@pytest.mark.parametrize("limit", [1, 50, 10**6])
def test_reader_reads_what_the_writer_wrote(tmp_path, limit):
    tensors = {f"t{i}": random_tensor(torch.bfloat16, (i, 3)) for i in range(6)}
    write_all(tmp_path, tensors, limit)
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    assert reader.tensors.keys() == tensors.keys()
    assert all(same_bits(reader.tensor(name), tensors[name]) for name in tensors)


def test_mistakes_in_the_plan_are_errors(tmp_path):
    one = TensorInfo("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="twice"):
        CheckpointWriter(tmp_path, [one, one], 100, {})
    for number, wrong in enumerate((torch.zeros(2, dtype=torch.float16), torch.zeros(3), torch.zeros(2, 1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with CheckpointWriter(folder, [one], 100, {}) as writer, pytest.raises(ValueError, match="planned"):
            writer.write("a", wrong)
    (tmp_path / "unfinished").mkdir()
    with CheckpointWriter(tmp_path / "unfinished", [one], 100, {}) as writer:
        with pytest.raises(KeyError):
            writer.write("b", torch.zeros(2))
        with pytest.raises(LowbitError, match="a"):
            writer.finish(0)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_full_disk_is_found_before_the_work_and_leaves_no_file_open(tmp_path, monkeypatch):
    before = open_files()
    infos = [TensorInfo(name, torch.uint8, (100,)) for name in "abc"]
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OutputError, match="free"):
        CheckpointWriter(tmp_path, infos, 100, {})
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_space(tmp_path, monkeypatch, code):
    """Some network and FUSE file systems: the space is found missing later, and that is all."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_all(tmp_path, {"a": torch.arange(5)})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(5))


def test_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    tensor = torch.zeros(100)
    with CheckpointWriter(tmp_path, [TensorInfo("a", tensor.dtype, (100,))], 10**6, {}) as writer:
        monkeypatch.setattr(os, "pwrite", no_space)
        with pytest.raises(OutputError, match=r"model\.safetensors.*No space left"):
            writer.write("a", tensor)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_short_writes_are_continued(tmp_path, monkeypatch, size):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:size], offset))
    tensors = {"a": torch.arange(50), "b": torch.arange(3)}
    write_all(tmp_path, tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kB", 1500), ("2GiB", 2**31), (" 3 MiB ", 3 * 2**20),
     ("1tb", 10**12), ("100", 100),
      (100, 100), ("7B", 7), ("0.5KB", 500)],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-5GB", "GB", "5XB", "5GB5", "five", "1e9", "nan", "inf", "0.1B", "5 GB MB", "5iB", "9" * 400],
    ids=lambda text: text[:10] or "nothing",
)
def test_sizes_that_make_no_sense(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


# Output folders


def stage(target, overwrite=False, text="new"):
    with StagedFolder(target, overwrite) as staged:
        (staged.path / "config.json").write_text(text)
        staged.commit()


def old_folder(target):
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "of the old one").write_text("old")
    return target


def test_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a [b]*" / "out"
    with StagedFolder(target) as staged:
        (staged.path / "config.json").write_text("new")
        assert not target.exists() and staged.path.is_relative_to(target.parent)  # on the same file system
        staged.commit()
    assert contents(target.parent) == {"out": b"", "out/config.json": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_appears_when_something_goes_wrong(tmp_path, error):
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
def test_what_is_no_model_folder_is_never_replaced(tmp_path, kind, overwrite):
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


# One run beside another at any moment

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
