"""What a run did, for people and for scripts: `lowbit_report.json` in the folder that it wrote."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from lowbit import __version__
from lowbit.checkpoint.manifest import REPORT_NAME
from lowbit.checkpoint.side_files import refuse_foreign
from lowbit.errors import InputError
from lowbit.guards.reading import read_json
from lowbit.guards.records import record
from lowbit.guards.safe_files import write_whole
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.quantization.plan import Plan, Step

# Rows looked at for the error of a layer: enough for three digits, and far cheaper than the quantization itself
_SAMPLED_ROWS = 64


def weight_error(weight: torch.Tensor, qweight: QuantWeight) -> float:
    """Relative error ||W - Q|| / ||W|| over evenly spaced rows."""
    step = max(1, weight.shape[0] // _SAMPLED_ROWS)
    rows = weight[::step].float()
    sampled = QuantWeight(
        qweight.codes[::step],
        qweight.scales[::step],
        qweight.scheme.weight_only,
        None if qweight.zeros is None else qweight.zeros[::step],
    )
    difference = dequantize(sampled, torch.float32).sub_(rows)
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(rows).clamp_min(1e-30))


def layer_entry(step: Step, expert: int | None = None) -> dict:
    """What is known of a weight before it is quantized; with `expert` that of the one matrix.

    module: the name that `--override` and `--ignore` match. shape: [out_features, in_features], of fused experts that
    have one entry together [experts, out_features, in_features].
    """
    *experts, rows, columns = step.source.shape
    matrices = experts.pop() if experts and expert is not None else 1
    return {
        "name": step.source.name,
        "module": step.site.module,
        "kind": _last_part(step.site.module),
        "scheme": step.scheme.name,
        "shape": [*experts, columns, rows] if step.transposed else [*experts, rows, columns],
        "source_bytes": step.source.nbytes // matrices,
        "bytes": sum(info.nbytes for info in step.outputs) // matrices,
    }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors")
    return {"python": platform.python_version(), "lowbit": __version__, **{name: version(name) for name in packages}}


def machine() -> str:
    """The GPU, or the CPU with its threads."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
    return cpu()


def cpu() -> str:
    """The CPU with its threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@dataclass
class Report:
    """The fields are the keys of the file: who quantized what, with which recipe, and what came of it.

    Sizes and memory are in bytes, errors relative, `seconds` of all runs that it took. quantized_share: of the source
    bytes. parts: bytes before and after by the last part of the module name, everything in the checkpoint. layers: an
    entry for each weight, in calibrated runs for each expert's. decoder_layers: calibrated runs only. quality: what
    `lowbit eval --save` measured since.
    """

    source: str
    source_revision: str | None
    recipe: dict
    format: str
    command: str | None
    source_bytes: int
    output_bytes: int
    parameters: int
    quantized_tensors: int
    quantized_share: float
    bits_per_weight: float
    fallbacks: dict[str, str]
    left_alone: dict[str, str]
    parts: dict[str, dict[str, int]]
    lowbit: str = __version__
    date: str = field(default_factory=now)
    versions: dict[str, str] = field(default_factory=versions)
    machine: str = field(default_factory=machine)
    seconds: float = 0.0
    peak_memory: int = 0
    expected_peak: int | None = None
    calibration: dict | None = None
    quality: dict | None = None
    decoder_layers: list[dict] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, source: str, folder: Path, command: str | None) -> "Report":
        """source: as `recorded_name` has it. folder: where it is."""
        left = {step.source.name: step.reason for step in plan.steps if step.site is not None and step.scheme is None}
        return cls(
            source=source,
            source_revision=folder.name if folder.parent.name == "snapshots" else None,  # of the Hub's cache
            recipe=plan.recipe.to_dict(),
            format=plan.format_name,
            command=command,
            source_bytes=plan.source_bytes,
            output_bytes=plan.output_bytes,
            parameters=plan.total_parameters,
            quantized_tensors=len(plan.quantized),
            quantized_share=plan.quantized_share,
            bits_per_weight=plan.bits_per_weight,
            fallbacks={step.source.name: step.scheme.name for step in plan.fallbacks},
            left_alone=left,
            parts=_parts(plan),
        )

    def add(self, step: Step, error: float) -> None:
        self.layers.append({**layer_entry(step), "error": error})

    @property
    def mean_error(self) -> float:
        return _mean(layer["error"] for layer in self.layers)

    @property
    def mean_rounding_error(self) -> float:
        return _mean(layer["rounding_error"] for layer in self.layers if layer.get("rounding_error") is not None)

    def worst(self, count: int) -> list[dict]:
        """The weights whose rounding costs most in outputs."""
        known = [layer for layer in self.layers if layer.get("rounding_error") is not None]
        return sorted(known, key=lambda layer: -layer["rounding_error"])[:count]

    def to_dict(self) -> dict:
        return asdict(self)


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


def _parts(plan: Plan) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for step in plan.steps:
        module = step.site.module if step.site is not None else step.source.name.rpartition(".")[0]
        part = parts.setdefault(_last_part(module), {"source_bytes": 0, "bytes": 0})
        part["source_bytes"] += step.source.nbytes
        part["bytes"] += sum(info.nbytes for info in step.outputs)
    return parts


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)
