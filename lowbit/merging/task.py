"""A merge that is under way, and what is said of it when it is done."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.conversion.rewrite import OnStart
from lowbit.folders.quantized import QuantizedFolder
from lowbit.merging.source import MergedSource
from lowbit.options import OutputOptions
from lowbit.system.machine import RunFacts


@dataclass(frozen=True)
class Merge:
    """What was done, sizes in bytes.

    format, method: what the weights are stored in and were rounded by, None for a dense model. merged: the tensors that
    the adapter changed. requantized: how many were rounded again. untied: whether the output embedding is a tensor of
    its own from now on. quality: of the merged model, its KL divergence that to the model with the adapter beside it;
    None where it was not measured.
    """

    model: str
    adapter: str
    output: str
    format: str | None
    method: str | None
    merged: tuple[str, ...]
    requantized: int
    untied: bool
    source_bytes: int
    output_bytes: int
    seconds: float
    quality: dict | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class _Merging:
    source: str
    source_revision: str | None
    adapter: str
    command: str | None
    source_bytes: int
    output_bytes: int
    parameters: int
    requantized: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)


@dataclass
class MergeReport(RunFacts, _Merging):
    """The keys of lowbit_report.json of a folder whose other tensors are those of the model, beside what stays true of
    the report of that."""


@dataclass
class Task:
    """folder, adapter: the folders that are read, target: the one that is written. merged: the model with the adapter.
    stored: the model, where it is quantized in a format of lowbit. report: is filled in."""

    folder: Path
    adapter: Path
    target: Path
    merged: MergedSource
    stored: QuantizedFolder | None
    output: OutputOptions
    report: MergeReport
    trust_remote_code: bool = False
    on_start: OnStart | None = None
