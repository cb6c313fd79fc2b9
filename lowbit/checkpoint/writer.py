"""Writes a checkpoint whose layout is known beforehand: shards are allocated first, tensors land at their offsets.

The output folder appears whole or not at all: everything goes to a hidden folder beside it, renamed at the end.
"""

import errno
import json
import math
import os
import re
import shutil
import time
import weakref
from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, build_header
from lowbit.checkpoint.manifest import digest
from lowbit.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from lowbit.errors import InputError, OutputError, UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str | int) -> int:
    """ "5GB" -> 5_000_000_000, as transformers and huggingface_hub read sizes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(text), re.IGNORECASE)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if not 1 <= size < math.inf:
        raise UsageError(f"size {text!r} is not understood; expected a positive number and a unit, e.g. 5GB or 500MB")
    return int(size)


def split_shards(tensors: list[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Tensors in order, a new shard when the next one would pass the limit; a larger tensor gets a shard of its own."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def file_bytes(tensors: list[TensorInfo], max_shard_size: int) -> int:
    """The size of all weight files that will hold `tensors`, headers and all."""
    shards = split_shards(tensors, max_shard_size)
    return sum(len(build_header(shard, _METADATA)[0]) + sum(t.nbytes for t in shard) for shard in shards)


# transformers refuses files that do not say this
_METADATA = {"format": "pt"}


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class StagedFolder:
    """A folder under construction beside `target`. `commit` renames it into place; anything else removes it.

    Removal is also tied to garbage collection and interpreter exit. What `kill -9` leaves is removed by the next run
    that writes to the same target: a folder is in use as long as a process holds the lock on the file inside. (Process
    numbers would not do: containers that share a volume have the same few.)
    """

    def __init__(self, target: str | Path, overwrite: bool = False):
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        try:
            self._remove_leftovers()
            self._check_target()
            parents = [p for p in self.target.parents if not p.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path = self.target.with_name(f".{self.target.name}.partial-{time.time_ns()}")
            self.path.mkdir()
            self._lock = (self.path / _LOCK).open("w")
            try_lock(self._lock)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write to {self.target.parent}: {reason}") from None
        self._cleanup = weakref.finalize(self, _remove, self.path, self._lock, parents)

    def _check_target(self) -> None:
        if not self.target.exists() and not self.target.is_symlink():
            return
        if not self.target.is_dir() or self.target.is_symlink():
            raise OutputError(f"{self.target} exists and is not a folder: choose another output folder")
        empty = not any(self.target.iterdir())
        if not self.overwrite and not empty:
            raise OutputError(f"{self.target} exists already: choose another output folder, or pass --overwrite")
        if not empty and not (self.target / "config.json").is_file():
            raise OutputError(f"{self.target} does not look like a model folder (no config.json): not overwriting it")

    def _remove_leftovers(self) -> None:
        pattern = re.compile(re.escape(f".{self.target.name}.partial-") + r"\d+(\.old)?")
        for leftover in sorted(self.target.parent.glob(".*.partial-*")):
            match = pattern.fullmatch(leftover.name)
            if not match or _is_in_use(leftover.with_name(leftover.name.removesuffix(".old"))):
                continue
            if match[1] and not self.target.exists():
                leftover.rename(self.target)  # killed between the two renames of `commit`
            else:
                shutil.rmtree(leftover, ignore_errors=True)

    def commit(self) -> None:
        self._check_target()  # someone else may have been faster
        aside = self.path.with_name(self.path.name + ".old")
        try:
            (self.path / _LOCK).unlink()
            if self.target.is_dir():
                self.target.rename(aside)
            try:
                self.path.rename(self.target)
            except BaseException:
                if aside.is_dir():
                    aside.rename(self.target)
                raise
        except OSError as error:
            raise OutputError(f"cannot move the finished folder to {self.target}: {error.strerror}") from None
        self._cleanup.detach()
        self._lock.close()
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        self._cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.discard()


_LOCK = ".lock"


def try_lock(file) -> bool:
    """Lock an open file for as long as it is open; False if another process has it. True where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _is_in_use(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as lock:
            return not try_lock(lock)
    except OSError:
        return False


def _remove(folder: Path, lock, parents: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
    try:
        for parent in parents:  # those that were made for it, unless others use them by now
            parent.rmdir()
    except OSError:
        pass


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _write_at(descriptor: int, data, offset: int) -> None:
    """All of `data`: a single pwrite may stop short."""
    data, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


class CheckpointWriter:
    """Writes the shards of `tensors` (all that the checkpoint will hold, in order) into `folder`.

    The space is claimed at once, so a full disk is found before the work, not after it.
    """

    def __init__(self, folder: Path, tensors: list[TensorInfo], max_shard_size: int, metadata: dict[str, str]):
        shards = split_shards(tensors, max_shard_size)
        self.total_size = sum(tensor.nbytes for tensor in tensors)
        self._pending = {tensor.name: tensor for tensor in tensors}
        if len(self._pending) != len(tensors):
            raise ValueError("a tensor name is planned twice")
        self._places: dict[str, tuple[int, int]] = {}
        self._files = []
        self.weight_map: dict[str, str] = {}
        self.digests: dict[str, str] = {}  # of the bytes of each tensor that is written
        self.folder = folder
        try:
            self._open(shards, metadata)
        except BaseException:
            self.close()
            raise

    def _open(self, shards: list[list[TensorInfo]], metadata: dict[str, str]) -> None:
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            header, offsets = build_header(shard, {**_METADATA, **metadata})
            size = len(header) + sum(t.nbytes for t in shard)
            descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files.append(descriptor)
            self._claim(descriptor, size, name)
            _write_at(descriptor, header, 0)
            for tensor in shard:
                self._places[tensor.name] = (descriptor, offsets[tensor.name])
                self.weight_map[tensor.name] = name

    def _claim(self, descriptor: int, size: int, name: str) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                return  # a file system that cannot reserve: a full disk is found when it is full
            free = shutil.disk_usage(self.folder).free
            raise OutputError(
                f"cannot reserve {size:,} bytes for {name} in {self.folder.parent} ({free:,} free): {error.strerror}"
            ) from None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        planned = self._pending.pop(name)
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {planned.dtype} {planned.shape}")
        if not planned.nbytes:
            self.digests[name] = digest(b"")
            return
        descriptor, offset = self._places[name]
        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.digests[name] = digest(data)
        try:
            _write_at(descriptor, data, offset)
        except OSError as error:
            raise OutputError(f"cannot write {name} to {self.weight_map[name]}: {error.strerror}") from None

    def finish(self, total_parameters: int) -> None:
        """Flush the shards to the disk and write the index where there are several."""
        if self._pending:
            raise InputError(
                f"{len(self._pending)} planned tensors were not written, first: {next(iter(self._pending))}"
            )
        for descriptor in self._files:
            os.fsync(descriptor)
        self.close()
        if len(set(self.weight_map.values())) > 1:
            metadata = {"total_parameters": total_parameters, "total_size": self.total_size}
            index = {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
