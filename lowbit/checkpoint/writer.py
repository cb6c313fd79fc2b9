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
from collections.abc import Sequence
from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, build_header
from lowbit.checkpoint.manifest import digest
from lowbit.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.guards import safe_files

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
    shards: list[list[TensorInfo]] = [[]]
    size = 0
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
    """A folder under construction: `path`, in a hidden folder beside `target`. `commit` renames it into place; anything
    else removes it.

    The hidden folder `.NAME.partial-<number>` is locked from before anything is in it until nothing is left of it, and
    holds the new output and, while the two change places, the old one. Removal is also tied to garbage collection and
    interpreter exit. What `kill -9` leaves is removed by the next run that writes to the same target and gets the lock.
    (Process numbers would not do: containers that share a volume have the same few.)
    """

    def __init__(self, target: str | Path, overwrite: bool = False):
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        safe_files.refuse_where_we_are(self.target)
        try:
            self._remove_leftovers()
            self._check_target()
            self._make([p for p in self.target.parents if not p.exists()])
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write to {self.target.parent}: {reason}") from None

    def _make(self, parents: list[Path]) -> None:
        self._hidden: Path
        self._cleanup: weakref.finalize
        lock = None
        while lock is None:  # a run that takes it for a leftover may be faster
            self._hidden = self.target.with_name(f".{self.target.name}.partial-{time.time_ns()}")
            try:
                lock = safe_files.claim(self._hidden)
                if lock is not None:
                    self._cleanup = weakref.finalize(self, _discard, self._hidden, self.target, lock, parents)
                    self.path = self._hidden / _NEW
                    self.path.mkdir()
            except BaseException:  # Ctrl-C, or a full disk, before there is anything else to clean up
                safe_files.remove(self._hidden)
                safe_files.remove_empty(parents)
                raise

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
        pattern = re.compile(re.escape(f".{self.target.name}.partial-") + r"\d+")
        for leftover in sorted(self.target.parent.glob(".*.partial-*")):
            if not pattern.fullmatch(leftover.name):
                continue
            if leftover.is_symlink():  # no run makes one
                safe_files.remove(leftover)
                continue
            try:
                lock = safe_files.claim(leftover, make=False, sure=True)
            except (OSError, OutputError):  # gone by now, or not ours to remove
                continue
            if lock is not None:
                _discard(leftover, self.target, lock)

    def commit(self) -> None:
        self._check_target()  # someone else may have been faster
        try:
            if self.target.is_dir():
                self.target.rename(self._hidden / _OLD)
            self.path.rename(self.target)
        except OSError as error:
            raise OutputError(f"cannot move the finished folder to {self.target}: {error.strerror}") from None
        self.discard()  # the old one

    def discard(self) -> None:
        self._cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.discard()


_NEW, _OLD = "new", "old"


def _discard(hidden: Path, target: Path, lock, parents: Sequence[Path] = ()) -> None:
    """Remove a claimed folder of `StagedFolder`, but the old output that `commit` moved into it goes back to its place
    if the new one did not get there. As the new one is removed first, an old one without it is never taken for whole.
    parents: folders that were made for the target, which go too unless others use them by now."""
    new, old = hidden / _NEW, hidden / _OLD
    if _is_folder(new) and _is_folder(old) and not os.path.lexists(target):
        try:
            old.rename(target)
        except OSError:  # the only copy: the next run tries again
            lock.close()
            return
    try:
        safe_files.remove_claimed(hidden, lock, last=(_OLD,))
    finally:
        safe_files.remove_empty(parents)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


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
        self._files: list[int] = []
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
            descriptor = safe_files.create(self.folder / name, 0o644)
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
        numbers = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        data = memoryview(numbers)  # type: ignore[arg-type]  # numpy 2 gives a buffer
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
            safe_files.write_whole(self.folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
