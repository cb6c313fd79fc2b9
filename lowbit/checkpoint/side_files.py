"""Everything in a model folder that is not weights: tokenizer, chat template, processor, LICENSE, remote code, ..."""

import logging
from collections.abc import Iterable
from pathlib import Path

from lowbit.checkpoint.gguf.index import INDEX_NAME as GGUF_INDEX_NAME
from lowbit.checkpoint.manifest import MANIFEST_NAME, REPORT_NAME
from lowbit.checkpoint.reader import PICKLE_SUFFIXES
from lowbit.errors import InputError
from lowbit.guards.safe_files import copy_file

logger = logging.getLogger("lowbit")

# Weights in other formats are not side files: the quantized folder would be larger than the source
WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    ".safetensors",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".tflite",
    ".ot",
)
# In any of the formats; a report says nothing about a model that is made from the output of its run
WRITTEN_ANEW = (
    "config.json", "quantize_config.json", "quant_config.json", MANIFEST_NAME, REPORT_NAME, GGUF_INDEX_NAME,
)  # fmt: skip


def visible(folder: Path) -> list[Path]:
    """All paths below `folder`, but hidden ones and what is in hidden folders. Links to folders are not entered."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)

    return [path for path in sorted(folder.rglob("*")) if not hidden(path)]


def side_files(folder: Path) -> list[Path]:
    """Paths relative to `folder`; hidden files and folders, and links that lead out of it, are left out."""
    return [path.relative_to(folder) for path in visible(folder) if _travels(path, folder) and is_own(path, folder)]


def _travels(path: Path, folder: Path) -> bool:
    """Whether it is a file that goes with the weights, by its name."""
    name = path.relative_to(folder).as_posix()
    if not path.is_file() or path.suffix.lower() in WEIGHT_SUFFIXES or name in WRITTEN_ANEW:
        return False
    return not name.endswith((".safetensors.index.json", ".bin.index.json"))


def is_own(path: Path, folder: Path) -> bool:
    """Whether `path` in a model folder is a file of that folder: its content may leave the machine with the model.

    A link is one if it leads to a file inside the folder, or in a folder of the Hub's cache from
    snapshots/<revision>/NAME to blobs/<hash> of the same repository.
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False
    folder = folder.resolve()
    blobs = folder.parent.parent / "blobs"
    inside = target.is_relative_to(folder) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))
    return inside and target.is_file()


def foreign_links(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that are links and lead to no file of `folder` (see `is_own`)."""
    return [path for path in paths if path.is_symlink() and not is_own(path, folder)]


def refuse_foreign(folder: Path, paths: Iterable[Path]) -> None:
    """Raise InputError, naming the first of `foreign_links`."""
    if foreign := foreign_links(folder, paths):
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise InputError(
            f"{foreign[0]}{more} is a link to something that is no file of {folder}: "
            "remove it, or put a copy of what is meant in its place"
        )


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the side files of a model into a new folder, and say which links were left out. Returns relative names."""
    if foreign := [path.name for path in visible(source) if _travels(path, source) and not is_own(path, source)]:
        logger.warning("not copied from %s, because they are links that lead out of it: %r", source, foreign)
    copied = []
    for relative in side_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / relative, target / relative)
        copied.append(relative.as_posix())
    return copied
