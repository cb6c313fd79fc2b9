"""What a calibrated run has finished: one file for each layer and job.json, in a hidden folder beside the output.

Files are written aside and renamed, the layer before job.json names it, so that whatever kills the process, the folder
tells a true state. A layer's file carries its hash in its name and is checked before it is used again.
"""

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.checkpoint.layout import StoredTensor, TensorInfo, read_header
from lowbit.checkpoint.reader import SINGLE_NAME
from lowbit.checkpoint.writer import CheckpointWriter
from lowbit.errors import InputError, OutputError
from lowbit.guards import safe_files
from lowbit.guards.reading import open_regular, read_json
from lowbit.guards.records import record, shown
from lowbit.quantization.plan import Step

_STATE = "job.json"


@dataclass(frozen=True)
class _Module:
    error: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class _LayerReport:
    modules: list[_Module]
    seconds: float
    smoothing: list[dict] = ()


@dataclass(frozen=True)
class _Layer:
    file: str
    report: _LayerReport
    sha256: str | None = None
    streams: list[str] | None = None


@dataclass(frozen=True)
class _Identity:
    tokens: str = ""


@dataclass(frozen=True)
class _State:
    """What `_write_state` writes, as far as it is used again."""

    identity: _Identity
    layers: list[_Layer]
    output: list[int] | None = None


class Job:
    """The folder `.NAME.job` of the output folder NAME.

    identity: what the result depends on, nested dicts of plain values. layers: {"file", "sha256", "report", "streams"}
    of each finished one, in order; streams: digests of the hidden states behind it, of each rank. overwrite: of a run
    with another identity nothing is kept.
    """

    def __init__(self, target: Path, identity: dict, *, overwrite: bool = False, owner: bool = True):
        self.folder = _folder_of(target)
        self.identity, self._overwrite = identity, overwrite
        self.layers: list[dict] = []
        self._output: list[int] | None = None
        self._made: dict[str, StoredTensor] | None = None
        self._lock = None
        try:
            if owner:
                self._claim(target)
            self.stored = self._read()
        except BaseException:
            self.close()
            raise

    def _claim(self, target: Path) -> None:
        try:
            self._lock = safe_files.claim(self.folder)
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder.parent}: {error.strerror}") from None
        if self._lock is None:
            raise OutputError(f"another run is working on {target}: wait for it, or choose another output folder")
        safe_files.refuse_links(self.folder)

    def _read(self) -> dict:
        if not (self.folder / _STATE).exists():
            return {}
        try:
            return _read_state(self.folder)
        except InputError as error:
            if self._overwrite:
                return {}
            raise OutputError(f"cannot read the unfinished run ({error}): pass --overwrite to start anew") from None

    def resume(
        self, layers: list[list[TensorInfo]], planned: list[TensorInfo], first_to_redo: int | None = None
    ) -> int:
        """Take over the finished layers of an earlier run; how many there are.

        layers: what each of them is quantized to. planned: all that the output will hold.
        first_to_redo: forget that layer and those after it; settings of the method may differ then. Raises OutputError
        naming what differs if that run had another identity, and is not to be overwritten.
        """
        stored = self.stored
        if stored:
            different = list(differences(stored["identity"], self.identity))
            if first_to_redo is not None:
                different = [line for line in different if not line.startswith(_MAY_CHANGE)]
            if different and self._overwrite:
                stored = {}
            elif different:
                raise OutputError(
                    f"the unfinished run in {self.folder} had other settings ({'; '.join(different[:4])}): "
                    "run with those to go on, or pass --overwrite to start anew"
                )
        kinds = {info.name: (info.dtype, info.shape) for info in planned}
        for entry, wanted in zip(stored.get("layers", [])[:first_to_redo], layers, strict=False):
            if not self._is_whole(entry, {info.name for info in wanted}, kinds):
                break
            self.layers.append(entry)
        self._write_state()
        return len(self.layers)

    def _is_whole(self, entry: dict, wanted: set[str], kinds: dict[str, tuple]) -> bool:
        """Whether a layer's file is the one that was written, with tensors that this run would write."""
        path = self.folder / entry["file"]
        try:
            if not path.is_file() or file_hash(path) != entry.get("sha256"):
                return False
            found = {info.name: (info.dtype, info.shape) for info in read_header(path)}
        except (InputError, OSError):
            return False
        return wanted <= found.keys() and all(kinds.get(name) == kind for name, kind in found.items())

    def take(self, count: int) -> None:
        """The same state in a process that does not own the folder: the first `count` layers as they are stored."""
        self.layers = self._read()["layers"][:count]

    def commit(
        self, tensors: dict[str, torch.Tensor], report: dict, streams: list[str] | None = None, write: bool = True
    ) -> None:
        """Add the next layer: its packed tensors, what the report says of it, and the digest of each rank's hidden
        states behind it. write: False in all processes but the one that owns the folder."""
        if not write:
            self.layers.append({"report": report})
            return
        aside = self.folder / "layer.partial"
        safe_files.remove(aside)
        aside.mkdir()
        infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with CheckpointWriter(aside, infos, 2**62, {}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.finish(0)
        digest = file_hash(aside / SINGLE_NAME)
        name = f"layer-{len(self.layers):04d}-{digest[:16]}.safetensors"
        (aside / SINGLE_NAME).rename(self.folder / name)
        safe_files.remove(aside)
        self.layers.append({"file": name, "sha256": digest, "report": report, "streams": streams})
        self._made = None  # what was known of the finished layers lacks this one
        self._write_state()

    def stored_tensors(self, number: int) -> dict[str, StoredTensor]:
        """The packed tensors of a finished layer, by name."""
        return {info.name: info for info in read_header(self.folder / self.layers[number]["file"])}

    def made(self, step: Step) -> dict[str, torch.Tensor] | None:
        """The output tensors of a step, if a finished layer has them."""
        if self._made is None:
            self._made = {k: v for number in range(len(self.layers)) for k, v in self.stored_tensors(number).items()}
        if step.outputs[0].name not in self._made:
            return None
        return {info.name: self._made[info.name].read() for info in step.outputs}

    def streams(self, number: int, rank: int) -> Path:
        """Where the hidden states at the input of layer `number` are, or will be."""
        return self.folder / f"streams-{number:04d}-{rank}"

    def stream_digest(self, number: int, rank: int) -> str | None:
        """That of the hidden states at the input of layer `number`; None where no run has recorded it."""
        digests = self.layers[number - 1].get("streams") if 0 < number <= len(self.layers) else None
        return digests[rank] if digests and rank < len(digests) else None

    def drop_streams(self, number: int, rank: int) -> None:
        """Remove those of all layers but `number`."""
        for path in self.folder.glob(f"streams-*-{rank}*"):
            if path != self.streams(number, rank):
                safe_files.remove(path)

    def about_to_move(self, whole: Path) -> None:
        """The folder `whole` is all of the output, and will be renamed to NAME next."""
        self._output = _inode(whole)
        self._write_state()

    def _write_state(self) -> None:
        state = {"identity": self.identity, "layers": self.layers, "output": self._output}
        safe_files.write_whole(self.folder / _STATE, json.dumps(state, indent=1), durable=True)

    def finish(self) -> None:
        """The output is in place: nothing here is needed any more."""
        _remove(self.folder, self._lock)

    def close(self) -> None:
        """Leave the folder to the next run; one in which nothing was begun is removed."""
        if self._lock is None or self._lock.closed:
            return
        if os.path.lexists(self.folder / _STATE):
            self._lock.close()
        else:
            _remove(self.folder, self._lock)


def clear_finished(target: Path) -> None:
    """Remove the job folder of a run that was killed when its output was in place already.

    Raises OutputError for a job folder that no run has left: a link, or one with links in it."""
    folder = _folder_of(target)
    try:
        safe_files.refuse_links(folder)
        with safe_files.claim(folder, make=False) or nullcontext() as lock:
            if lock is not None and _is_finished(folder, target):
                _remove(folder, lock)
    except (OSError, InputError):
        pass


def _folder_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.job")


def _remove(folder: Path, lock) -> None:
    """job.json goes last: a run that is killed here is known to have finished."""
    safe_files.remove_claimed(folder, lock, last=(_STATE,))


def _is_finished(folder: Path, target: Path) -> bool:
    if not (folder / _STATE).exists():  # not begun, or all but removed
        return True
    return _read_state(folder).get("output") == _inode(target)


def _inode(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino]


def _read_state(folder: Path) -> dict:
    """What `_write_state` has written. Raises InputError for anything else."""
    path = folder / _STATE
    stored = read_json(path)
    for layer in record(_State, stored, str(path)).layers:
        if layer.file != Path(layer.file).name:
            raise InputError(f"{path} names {shown(layer.file)}, which is no file of {folder}")
    return stored


# What `--redo` may change: it only concerns layers that are done again
_MAY_CHANGE = ("recipe.options.", "calibration.", "tokens")


def differences(then: dict, now: dict, prefix: str = ""):
    """Yield "path: a then, b now" for each value that differs between two nested dicts."""
    for key in sorted({*then, *now}):
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a} then, {b} now"


def file_hash(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
