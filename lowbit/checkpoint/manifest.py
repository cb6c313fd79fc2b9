"""The contents of a finished folder, by checksum: what changes later is found, and named.

`lowbit_manifest.json`: {"tensors": {name: sha256 of its bytes}, "files": {name: sha256}}, hexadecimal. A card may be
written and a report be added afterwards: README.md and lowbit_report.json are not in it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import InputError
from lowbit.guards.reading import open_regular, read_json
from lowbit.guards.records import record, shown
from lowbit.guards.safe_files import write_whole

MANIFEST_NAME = "lowbit_manifest.json"
REPORT_NAME = "lowbit_report.json"
_NOT_LISTED = (MANIFEST_NAME, REPORT_NAME, "README.md")


@dataclass(frozen=True)
class Manifest:
    tensors: dict[str, str]
    files: dict[str, str]


def digest(data) -> str:
    """sha256 of bytes, or of what has their buffer."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file. Raises InputError where it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def listed_files(folder: Path) -> list[Path]:
    """Relative paths of what a manifest lists: no weights, nothing hidden."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.suffix != ".safetensors" and relative.name not in _NOT_LISTED:
            found.append(relative)
    return found


def write_manifest(folder: Path, tensors: dict[str, str]) -> None:
    """The last file that is written into a folder. tensors: name -> digest of its bytes."""
    files = {relative.as_posix(): file_digest(folder / relative) for relative in listed_files(folder)}
    data = {"tensors": tensors, "files": files}
    write_whole(folder / MANIFEST_NAME, json.dumps(data, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none; raises InputError if it cannot be read."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = record(Manifest, read_json(path), str(path))
    for name in manifest.files:
        # a manifest comes from strangers: it may only name files of the folder
        if not _is_inside(name):
            raise InputError(f"{path} names {shown(name)}, which is no file of {folder}: download it again")
    return manifest


def _is_inside(name: str) -> bool:
    return bool(name) and "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))
