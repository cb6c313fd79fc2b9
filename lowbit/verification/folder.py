"""A folder that is checked, opened once for all checks, and what a check finds."""

import math
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.decoded import DecodedTensor, decoded
from lowbit.checkpoint.manifest import Manifest, read_manifest
from lowbit.checkpoint.report_file import converted_dtype, load_report
from lowbit.errors import InputError
from lowbit.folders.opened import OpenedFolder


@dataclass(frozen=True)
class Check:
    """One question that was asked of a folder. ok None: it could not be asked, `detail` says why."""

    name: str
    ok: bool | None
    detail: str


class Problems:
    """What is wrong, as it is found; the first ones by name, all of them by number."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def check(self, name: str, otherwise: str) -> Check:
        if not self.found:
            return Check(name, True, otherwise)
        more = f" (and {len(self.found) - 1} more)" if len(self.found) > 1 else ""
        return Check(name, False, self.found[0] + more)


class Folder(OpenedFolder):
    """A saved folder, opened once for all checks.

    files: as it is stored. encoded: its weights in floating point of fewer bits, which all checks see decoded.

    Raises InputError if it cannot be opened at all.
    """

    def __init__(self, path: Path, trust_remote_code: bool = False):
        super().__init__(path, trust_remote_code, decoded)
        self.files = CheckpointReader(path)
        self.encoded = [info for info in self.stored.plain if isinstance(info, DecodedTensor)]
        self.trust_remote_code = trust_remote_code
        self.manifest: Manifest | None = read_manifest(path)
        self.dtype = None if self.stored.weights else converted_dtype(path)  # of a plain model that was converted to it
        self.moved, self.moved_otherwise = _moved(report_of(path))


def report_of(path: Path) -> dict:
    """Of the run that wrote the folder; empty, where there is none that can be read."""
    try:
        return load_report(path)
    except InputError:
        return {}


def _moved(report: dict) -> tuple[dict[tuple[str, int | None], float], float | None]:
    """How far the run moved weights before it rounded them: (name of the source, expert) -> relative to the weight, and
    of all others; None for unknown."""
    found = {}
    layers = report.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        moved = layer.get("moved") if isinstance(layer, dict) else None
        if type(moved) is float and math.isfinite(moved) and moved >= 0:
            expert = layer.get("expert")
            name = str(layer.get("name"))
            found[name, expert if type(expert) is int else None] = moved
            found.setdefault((name, None), moved)  # an expert that is stored as a tensor of its own
    recipe = report.get("recipe")
    rounded = isinstance(recipe, dict) and recipe.get("method") == "rtn"
    return found, 0.0 if rounded else None
