"""What the model card takes from files that anyone may have written, and of which type it is there."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class _Calibration:
    source: str | None = None
    samples: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class _Allocation:
    """`lowbit.folders.allocation` reads what is in the lists."""

    budget: dict[str, float] | None = None
    predicted_kl: float | None = None
    units: list[dict] | None = None
    judged: list[dict] | None = None
    frontier: list[dict] | None = None
    uniform: list[dict] | None = None


@dataclass(frozen=True)
class QualityFields:
    """Of `lowbit eval`."""

    dataset: str | None = None
    tokens: int | None = None
    seqlen: int | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class _Recipe:
    """The names and patterns of it; `lowbit.numerics.scheme` checks the rest."""

    scheme: dict
    method: str
    options: dict | None = None
    overrides: list[list[object]] | None = None
    ignore: list[str] | None = None


@dataclass(frozen=True)
class ReportFields:
    """Of lowbit_report.json, which `lowbit.quantization.report.Report` writes."""

    source: str | None = None
    source_revision: str | None = None
    source_bytes: float | None = None
    command: str | None = None
    lowbit: str | None = None
    date: str | None = None
    machine: str | None = None
    seconds: float | None = None
    peak_memory: float | None = None
    left_alone: dict[str, str] | None = None
    fallbacks: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    calibration: _Calibration | None = None
    allocation: _Allocation | None = None
    quality: QualityFields | None = None
    recipe: _Recipe | None = None


@dataclass(frozen=True)
class CardFields:
    """Of the metadata in front of README.md."""

    base_model: str | list[str] | None = None
    base_model_relation: str | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    pipeline_tag: str | None = None
    tags: list[str] | None = None


@dataclass(frozen=True)
class _Ignored:
    ignore: list[str] | None = None


@dataclass(frozen=True)
class ConfigFields:
    """Of config.json."""

    quantization_config: _Ignored | None = None
    name_or_path: str | None = field(default=None, metadata={"key": "_name_or_path"})
