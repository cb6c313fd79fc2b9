"""The hidden states between two layers, of the quantized and perhaps of the original model, in files.

Kept on disk always: for a large calibration set they are larger than a layer, the page cache holds them where there is
memory, and a run that was killed goes on from them.
"""

import json
from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, read_header
from lowbit.checkpoint.manifest import digest
from lowbit.checkpoint.reader import SINGLE_NAME
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import InputError
from lowbit.guards.safe_files import remove

_NAMES = ("quantized", "original")


class Streams:
    """Hidden states [B, T, H] by batch and stream, at the input of a layer: read-only, from `folder`."""

    def __init__(self, folder: Path):
        self._stored = {info.name: info for info in read_header(folder / SINGLE_NAME)}

    def check(self, expected: str | None) -> None:
        """Raise InputError unless these are the hidden states that `StreamsWriter.commit` gave this digest of."""
        tensors = ((name, info.read()) for name, info in self._stored.items())
        found = {name: digest(tensor.view(-1).view(torch.uint8).numpy()) for name, tensor in tensors}
        if _digest_of(found) != expected:
            raise InputError("the hidden states are not those that were written")

    def read(self, index: int) -> list[torch.Tensor]:
        """[quantized, original] of batch `index`, or [quantized]"""
        names = [f"{name}.{index}" for name in _NAMES]
        return [self._stored[name].read() for name in names if name in self._stored]


def _digest_of(digests: dict[str, str]) -> str:
    """One of all tensors."""
    return digest(json.dumps(sorted(digests.items())).encode())


class NoStreams:
    """At the input of the first layer: the models embed the tokens themselves."""

    def read(self, index: int) -> list[None]:
        return [None, None]


class StreamsWriter:
    """Writes `count` streams of `shapes` [B, T, H], one for each batch, beside `folder`; `commit` renames them."""

    def __init__(self, folder: Path, shapes: list[tuple[int, ...]], count: int, dtype: torch.dtype):
        self.folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        remove(self._partial)
        self._partial.mkdir()
        infos = [TensorInfo(f"{name}.{i}", dtype, shape) for i, shape in enumerate(shapes) for name in _NAMES[:count]]
        self._dtype = dtype
        self._writer = CheckpointWriter(self._partial, infos, 2**62, {})

    def write(self, index: int, hidden: list[torch.Tensor]) -> None:
        for name, tensor in zip(_NAMES, hidden, strict=False):
            self._writer.write(f"{name}.{index}", tensor.to(self._dtype))

    def commit(self) -> str:
        """Put them in place; their digest."""
        self._writer.finish(0)
        remove(self.folder)
        self._partial.rename(self.folder)
        return _digest_of(self._writer.digests)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()
        remove(self._partial)
