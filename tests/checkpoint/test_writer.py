"""Shards written at planned offsets, which any reader reads."""

import errno
import os

import pytest
import torch
from folders import contents, read_json, same_bits, stored_tensors
from safetensors import safe_open
from safetensors.torch import load_file

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.layout import DTYPES
from lowbit.checkpoint.writer import parse_size
from lowbit.errors import LowbitError, OutputError, UsageError

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
