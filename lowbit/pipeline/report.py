"""What a run did, for people and for scripts."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lowbit.errors import OutputError
from lowbit.grid import dequantize
from lowbit.pipeline.plan import Plan, Step
from lowbit.qweight import QuantWeight

# Rows looked at for the error of a layer: enough for three digits, and far cheaper than the quantization itself
_SAMPLED_ROWS = 64


def weight_error(weight: torch.Tensor, qweight: QuantWeight) -> float:
    """Relative error ||W - Q|| / ||W|| over evenly spaced rows."""
    step = max(1, weight.shape[0] // _SAMPLED_ROWS)
    rows = weight[::step].float()
    sampled = QuantWeight(
        qweight.codes[::step],
        qweight.scales[::step],
        qweight.scheme,
        None if qweight.zeros is None else qweight.zeros[::step],
    )
    difference = dequantize(sampled, torch.float32).sub_(rows)
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(rows).clamp_min(1e-30))


@dataclass
class Report:
    """source, output, recipe; sizes in bytes; share of the source bytes that was quantized; one entry for each weight.

    With calibration data also one entry for each decoder layer, what the data was, and memory in bytes.
    """

    source: str
    output: str
    recipe: dict
    source_bytes: int
    output_bytes: int
    total_parameters: int
    quantized_share: float
    bits_per_weight: float
    quantized_tensors: int
    fallbacks: dict[str, str]
    left_alone: dict[str, str]
    layers: list[dict] = field(default_factory=list)
    decoder_layers: list[dict] = field(default_factory=list)
    calibration: dict | None = None
    expected_peak: int | None = None
    peak_memory: int | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, plan: Plan, source: str, output: str) -> "Report":
        left = {step.source.name: step.reason for step in plan.steps if step.site is not None and step.scheme is None}
        return cls(
            source=source,
            output=output,
            recipe=plan.recipe.to_dict(),
            source_bytes=plan.source_bytes,
            output_bytes=plan.output_bytes,
            total_parameters=plan.total_parameters,
            quantized_share=plan.quantized_share,
            bits_per_weight=plan.bits_per_weight,
            quantized_tensors=len(plan.quantized),
            fallbacks={step.source.name: step.scheme.name for step in plan.fallbacks},
            left_alone=left,
        )

    def add(self, step: Step, error: float) -> None:
        self.layers.append({"name": step.source.name, "scheme": step.scheme.name, "relative_error": error})

    @property
    def mean_error(self) -> float:
        return _mean(layer["relative_error"] for layer in self.layers)

    @property
    def mean_output_error(self) -> float:
        return _mean(layer["output_error"] for layer in self.layers if layer.get("output_error") is not None)

    def worst(self, count: int) -> list[dict]:
        """The weights with the largest output errors."""
        known = [layer for layer in self.layers if layer.get("output_error") is not None]
        return sorted(known, key=lambda layer: -layer["output_error"])[:count]

    def to_dict(self) -> dict:
        return asdict(self)

    def write(self, target: Path) -> None:
        """NAME.report.json beside the folder NAME: not in it, for what is in it depends on nothing but the input."""
        path = target.with_name(target.name + ".report.json")
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"cannot write {path}: {error.strerror}") from None


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)
