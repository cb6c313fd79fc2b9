"""Writes a checkpoint whose layout is known beforehand: shards are allocated first, tensors land at their offsets.

The output folder appears whole or not at all: everything goes to a hidden folder beside it, renamed at the end.
"""

import json
import os
import re
import shutil
import weakref
from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, build_header
from lowbit.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from lowbit.errors import InputError, OutputError, UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str | int) -> int:
    """ "5GB" -> 5_000_000_000, as transformers and huggingface_hub read sizes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size <= 0:
        raise UsageError(f"size {text!r} is not understood; expected a positive number and a unit, e.g. 5GB or 500MB")
    return size


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


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class StagedFolder:
    """A folder under construction beside `target`. `commit` renames it into place; anything else removes it.

    Removal is also tied to garbage collection and interpreter exit; what `kill -9` leaves is removed by the next run
    that writes to the same target.
    """

    def __init__(self, target: str | Path, overwrite: bool = False):
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.path = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}")
            self.path.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {self.target.parent}: {error.strerror}") from None
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

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
        for leftover in self.target.parent.glob(f".{glob_escape(self.target.name)}.partial-*"):
            pid = leftover.name.rpartition("-")[2]
            if pid.isdigit() and not _is_running(int(pid)):
                shutil.rmtree(leftover, ignore_errors=True)

    def commit(self) -> None:
        aside = self.path.with_name(self.path.name + ".old")
        try:
            if self.target.is_dir():
                self.target.rename(aside)
            try:
                self.path.rename(self.target)
            except OSError:
                if aside.is_dir():
                    aside.rename(self.target)
                raise
        except OSError as error:
            raise OutputError(f"cannot move the finished folder to {self.target}: {error.strerror}") from None
        self._cleanup.detach()
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        self._cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.discard()


def glob_escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
        self.folder = folder
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            header, offsets = build_header(shard, {"format": "pt", **metadata})
            size = len(header) + sum(t.nbytes for t in shard)
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files.append(descriptor)
            self._claim(descriptor, size, name)
            os.pwrite(descriptor, header, 0)
            for tensor in shard:
                self._places[tensor.name] = (descriptor, offsets[tensor.name])
                self.weight_map[tensor.name] = name

    def _claim(self, descriptor: int, size: int, name: str) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise OutputError(
                f"cannot reserve {size:,} bytes for {name} in {self.folder.parent} ({free:,} free): {error.strerror}"
            ) from None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        planned = self._pending.pop(name)
        if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {planned.dtype} {planned.shape}")
        if not planned.nbytes:
            return
        descriptor, offset = self._places[name]
        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
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
