"""The hidden states between two layers, of the quantized and of the original model, in files.

Kept on disk always: for a large calibration set they are larger than a layer, the page cache holds them where there is
memory, and a run that was killed goes on from them.
"""

import shutil
from pathlib import Path

import torch

from lowbit.checkpoint.layout import TensorInfo, read_header
from lowbit.checkpoint.reader import SINGLE_NAME, read_tensor
from lowbit.checkpoint.writer import CheckpointWriter

_NAMES = ("quantized", "original")


class Streams:
    """Hidden states [B, T, H] by batch and stream, at the input of a layer: read-only, from `folder`."""

    def __init__(self, folder: Path):
        self._stored = {info.name: info for info in read_header(folder / SINGLE_NAME)}

    def read(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(quantized, original) of batch `index`"""
        return tuple(read_tensor(self._stored[f"{name}.{index}"]) for name in _NAMES)


class NoStreams:
    """At the input of the first layer: the models embed the tokens themselves."""

    def read(self, index: int) -> tuple[None, None]:
        return None, None


class StreamsWriter:
    """Writes the streams of `shapes` [B, T, H], one for each batch, beside `folder`; `commit` renames them to it."""

    def __init__(self, folder: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype):
        self.folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        infos = [TensorInfo(f"{name}.{i}", dtype, shape) for i, shape in enumerate(shapes) for name in _NAMES]
        self._dtype = dtype
        self._writer = CheckpointWriter(self._partial, infos, 2**62, {})

    def write(self, index: int, quantized: torch.Tensor, original: torch.Tensor) -> None:
        for name, tensor in zip(_NAMES, (quantized, original), strict=True):
            self._writer.write(f"{name}.{index}", tensor.to(self._dtype))

    def commit(self) -> None:
        self._writer.finish(0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._partial.rename(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writer.close()
        shutil.rmtree(self._partial, ignore_errors=True)
