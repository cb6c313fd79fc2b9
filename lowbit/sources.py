"""Which folder does MODEL mean: the embedded reference model, a local folder, or a repository on the Hub."""

import os
from importlib.resources import files
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.remote import RemoteHeaders
from lowbit.errors import InputError, OutputError, first_line

REFERENCE = "reference"
# What quantizing or running a model needs; pickle weights and other frameworks' copies stay on the Hub
_UNWANTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded if MODEL is a Hub id. `reference` is the model that lowbit embeds; a folder of
    that name is reached as ./reference. Raises InputError when there is no such folder or repository."""
    return _local(model) or _download(str(model), revision)


def open_headers(model: str | Path, revision: str | None = None, trust_remote_code: bool = False):
    """(the config and tensor headers of a model, its transformers config): of a folder, or read from the Hub without
    a download. Raises InputError as `resolve` does."""
    folder = _local(model)
    if folder is None:
        headers = RemoteHeaders(str(model), revision)
        return headers, load_config(headers.files, trust_remote_code)
    return CheckpointReader(folder), load_config(folder, trust_remote_code)


def recorded_name(model: str | Path) -> str:
    """What a report calls a model: by this name it is found again from any folder, and a folder is never taken for a
    repository. A Hub id, `reference`, or a path from the root."""
    return str(model) if str(model) == REFERENCE or _local(model) is None else os.path.abspath(Path(model).expanduser())


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
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.exists():
            return None
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is locked, no such home
        raise InputError(
            f"no such model folder: {name} ({getattr(error, 'strerror', None) or first_line(error)})"
        ) from None
    raise InputError(f"no such model folder: {name} (expected a folder, a Hub id such as org/name, or '{REFERENCE}')")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_UNWANTED)))
    except RepositoryNotFoundError:
        raise InputError(
            f"{name} is neither a folder nor a model on the Hub (private models need `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(f"{name} is not a folder, not in the local cache, and the Hub cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"cannot download {name}: {first_line(error)}") from None


def load_config(folder: Path, trust_remote_code: bool = False):
    """The transformers config of a model folder. Raises InputError, never runs remote code unless asked."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks little: whatever it stumbles over comes from this file
        reason = first_line(error)
        hint = " (pass --trust-remote-code if you trust its author)" if "trust_remote_code" in str(error) else ""
        raise InputError(f"cannot read {folder / 'config.json'}: {reason}{hint}") from None


def check_apart(source: Path, target: Path) -> None:
    """Raise OutputError if writing to `target` could touch the model that is read."""
    source, target = source.resolve(), Path(os.path.realpath(target))
    if source == target or source.is_relative_to(target) or target.is_relative_to(source):
        raise OutputError(f"the output folder {target} and the model {source} overlap: choose another output folder")
