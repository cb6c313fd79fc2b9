"""The hidden states between two layers, of the quantized and perhaps of the original model, in files.

Kept on disk always: for a large calibration set they are larger than a layer, the page cache holds them where there is
memory, and a run that was killed goes on from them.
"""

from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, read_header
from lowbit.checkpoint.reader import SINGLE_NAME, read_tensor
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.safe_files import remove

_NAMES = ("quantized", "original")


class Streams:
    """Hidden states [B, T, H] by batch and stream, at the input of a layer: read-only, from `folder`."""

    def __init__(self, folder: Path):
        self._stored = {info.name: info for info in read_header(folder / SINGLE_NAME)}

    def read(self, index: int) -> list[torch.Tensor]:
        """[quantized, original] of batch `index`, or [quantized]"""
        names = [f"{name}.{index}" for name in _NAMES]
        return [read_tensor(self._stored[name]) for name in names if name in self._stored]


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

    def commit(self) -> None:
        self._writer.finish(0)
        remove(self.folder)
        self._partial.rename(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()
        remove(self._partial)
