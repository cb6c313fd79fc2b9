"""`lowbit_report.json`: what a run says of the folder that it wrote."""

import json
from pathlib import Path

import torch

from lowbit.checkpoint.manifest import REPORT_NAME
from lowbit.checkpoint.side_files import refuse_foreign
from lowbit.errors import InputError
from lowbit.guards.reading import read_json
from lowbit.guards.records import record
from lowbit.guards.safe_files import write_whole
from lowbit.numerics.dtypes import DTYPES


def load_report(folder: Path) -> dict:
    """The report in a quantized folder: an object, whatever is in it. Raises InputError where there is none."""
    path = folder / REPORT_NAME
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder} (expected one that `lowbit quantize` wrote)")
    refuse_foreign(folder, [path])  # it is shown, and written back to the folder with what was measured
    if not path.exists():
        raise InputError(f"{folder} holds no {REPORT_NAME}: expected a folder that `lowbit quantize` wrote")
    try:
        return record(dict, read_json(path), str(path))
    except InputError as error:
        raise InputError(f"cannot read the report ({error}): quantize again to have one") from None


def save_report(folder: Path, report: dict) -> None:
    write_whole(folder / REPORT_NAME, json.dumps(report, indent=1) + "\n")


def copied_tensors(folder: Path) -> frozenset[str]:
    """The tensors that no module of the model has, and that the run which wrote the folder has copied all the same, as
    its report says; none, where there is no report."""
    try:
        said = load_report(folder).get("unclaimed")
    except InputError:
        return frozenset()
    return frozenset(name for name, what in said.items() if what == "copied") if isinstance(said, dict) else frozenset()


def converted_dtype(folder: Path) -> torch.dtype | None:
    """What `convert_dtype` made of all floating tensors of a folder, by its report; None: it did not write it."""
    try:
        return DTYPES.get(load_report(folder).get("dtype", ""))
    except (InputError, TypeError):
        return None
