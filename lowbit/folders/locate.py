"""Which folder does MODEL mean: the embedded reference model, a folder, a GGUF file, or a repository on the Hub."""

import os
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from lowbit.checkpoint import CheckpointReader, TensorInfo
from lowbit.checkpoint.gguf.header import is_gguf
from lowbit.checkpoint.reader import read_config
from lowbit.checkpoint.remote import RemoteHeaders
from lowbit.errors import InputError, OutputError, UsageError, first_line
from lowbit.folders.gguf import all_files, gguf_folder
from lowbit.guards.model_size import check_counts

REFERENCE = "reference"
# What quantizing or running a model needs; pickle weights and other frameworks' copies stay on the Hub
_UNWANTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*")


def resolve(model: str | Path, revision: str | None = None, **hub) -> Path:
    """The folder of a model, downloaded if MODEL is of the Hub. `reference` is the model that lowbit embeds; a folder
    of that name is reached as ./reference. Of a GGUF file it is one that `lowbit.folders.gguf` makes.

    Args:
        model: The folder, GGUF file, Hub id, GGUF file of a repository as "org/name:file.gguf", or "reference".
        revision: Of a Hub id.
        **hub: Keywords of `huggingface_hub.snapshot_download`, such as token.

    Raises:
        InputError: There is no such folder or repository.
        UsageError: A revision of a folder, which has none.
    """
    folder = _local(model)
    if folder is None:
        return _download(str(model), revision, **hub)
    _require_hub(model, revision)
    return folder


def open_headers(model: str | Path, revision: str | None = None, trust_remote_code: bool = False):
    """(the config and tensor headers of a model, its transformers config): of a folder, or read from the Hub without
    a download; of the local cache, where the Hub cannot be reached. Raises as `resolve` does."""
    folder = _local(model)
    if folder is None and is_gguf(Path(model)):
        folder = _download(str(model), revision)  # its head is longer than some models
    if folder is None:
        try:
            headers = RemoteHeaders(str(model), revision)
            return headers, load_config(headers.files, trust_remote_code, headers.tensors.values())
        except InputError as unreachable:
            try:
                folder = _download(str(model), revision, local_files_only=True)
            except InputError:
                raise unreachable from None
    else:
        _require_hub(model, revision)
    reader = CheckpointReader(folder)
    return reader, load_config(folder, trust_remote_code, reader.tensors.values())


def recorded_name(model: str | Path) -> str:
    """What a report calls a model: by this name it is found again from any folder, and a folder is never taken for a
    repository. A Hub id, `reference`, or a path from the root."""
    return str(model) if str(model) == REFERENCE or _local(model) is None else os.path.abspath(Path(model).expanduser())


def revision_of(folder: Path) -> str | None:
    """The revision that a folder of the Hub's cache holds, None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _local(model: str | Path) -> Path | None:
    """The folder that MODEL is, None if it is the name of a repository."""
    if str(model) == REFERENCE:
        return Path(str(files("lowbit") / "assets" / "reference"))
    name = str(model)
    if not name.strip():  # Path("") is the current folder
        raise InputError(f"no model is named: expected a folder, a Hub id such as org/name, or '{REFERENCE}'")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        if is_gguf(folder) and folder.is_file():
            return gguf_folder(folder)
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.exists():
            return None
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is locked, no such home
        raise InputError(
            f"no such model folder: {name} ({getattr(error, 'strerror', None) or first_line(error)})"
        ) from None
    raise InputError(
        f"no such model folder: {name} (expected a folder, a GGUF file, a Hub id such as org/name, or '{REFERENCE}')"
    )


def _require_hub(model: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"a revision is of a model on the Hub, {model} is here: leave out {revision!r}")


def _download(name: str, revision: str | None, **hub) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, file = name.partition(":")
    try:
        if file:
            parts = [Path(hf_hub_download(repository, part, revision=revision, **hub)) for part in all_files(file)]
            return gguf_folder(parts[0])
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_UNWANTED), **hub))
    except RepositoryNotFoundError:
        raise InputError(
            f"{repository} is neither a folder nor a model on the Hub (private models need `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(f"{name} is not a folder, not in the local cache, and the Hub cannot be reached") from None
    except EntryNotFoundError:
        raise InputError(f"{repository} on the Hub has no file {file}, or not all that it is split into") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"cannot download {name}: {first_line(error)}") from None


def load_config(folder: Path, trust_remote_code: bool = False, tensors: Iterable[TensorInfo] | None = None):
    """The transformers config of a model folder. tensors: of its weight files, read where a number in the config makes
    it necessary. Raises InputError, never runs remote code unless asked."""
    from transformers import AutoConfig

    check_counts(read_config(folder), _stored(folder) if tensors is None else tensors)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks little: whatever it stumbles over comes from this file
        reason = first_line(error)
        hint = " (pass --trust-remote-code if you trust its author)" if "trust_remote_code" in str(error) else ""
        raise InputError(f"cannot read {folder / 'config.json'}: {reason}{hint}") from None


def _stored(folder: Path) -> Iterator[TensorInfo]:
    """Opens the folder when the first one is asked for."""
    yield from CheckpointReader(folder).tensors.values()


def check_apart(source: Path, target: Path) -> None:
    """Raise OutputError if writing to `target` could touch the model that is read."""
    target = Path(os.path.realpath(target))
    linked = [file.resolve() for file in source.glob("*.gguf") if file.is_symlink()]
    for place in (source.resolve(), *linked):
        if place == target or place.is_relative_to(target) or target.is_relative_to(place):
            raise OutputError(f"the output folder {target} and the model {place} overlap: choose another output folder")
