"""What a run did, for people and for scripts: `lowbit_report.json` in the folder that it wrote."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.folders.locate import revision_of
from lowbit.quantization.plan import Plan, Step
from lowbit.system.machine import RunFacts


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


@dataclass
class _Planned:
    """What is known before anything is quantized, sizes in bytes. quantized_share: of the source bytes. parts: bytes
    before and after by the last part of the module name, everything in the checkpoint. converted: how many of the
    quantized tensors were integers before, on grids that hold them: exactly the same numbers. unclaimed: tensors that
    no module of the model has, such as those of layers that predict further tokens -> what became of them."""

    source: str
    source_revision: str | None
    recipe: dict
    format: str
    command: str | None
    source_bytes: int
    output_bytes: int
    parameters: int
    quantized_tensors: int
    converted: int
    quantized_share: float
    bits_per_weight: float
    fallbacks: dict[str, str]
    left_alone: dict[str, str]
    unclaimed: dict[str, str]
    parts: dict[str, dict[str, int]]


@dataclass
class Report(RunFacts, _Planned):
    """The fields are the keys of the file: who quantized what, with which recipe, and what came of it.

    Errors are relative, `seconds` of all runs that it took, expected_peak in bytes. layers: an entry for each weight,
    in calibrated runs for each expert's. decoder_layers: calibrated runs only. allocation: how schemes
    were chosen for a budget (`allocation.allocate`). quality: what `lowbit eval --save`
    measured since.
    """

    adapter: str | None = None  # that was merged into the source before
    expected_peak: int | None = None
    calibration: dict | None = None
    allocation: dict | None = None
    quality: dict | None = None
    decoder_layers: list[dict] = field(default_factory=list)
    layers: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, source: str, folder: Path, command: str | None) -> "Report":
        """source: as `recorded_name` has it. folder: where it is."""
        left = {step.source.name: step.reason for step in plan.steps if step.site is not None and step.scheme is None}
        return cls(
            source=source,
            source_revision=revision_of(folder),
            recipe=plan.recipe.to_dict(),
            format=plan.format_name,
            command=command,
            source_bytes=plan.source_bytes,
            output_bytes=plan.output_bytes,
            parameters=plan.total_parameters,
            quantized_tensors=len(plan.quantized),
            converted=len(plan.converted),
            quantized_share=plan.quantized_share,
            bits_per_weight=plan.bits_per_weight,
            fallbacks={step.source.name: step.scheme.name for step in plan.fallbacks},
            left_alone=left,
            unclaimed=plan.unclaimed,
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
