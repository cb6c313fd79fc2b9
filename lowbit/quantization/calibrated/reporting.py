"""What a calibrated run says while it works, and what it writes into its report."""

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.quantization.memory import ExpectedMemory
from lowbit.quantization.plan import Step
from lowbit.quantization.report import Report
from lowbit.quantization.write import Progress
from lowbit.system.memory import peak_memory
from lowbit.text.samples import Samples

# Called with a line that a user should read
Announce = Callable[[str], None]
# Called with a Step that is quantized, its relative output error where that is known, and the seconds since the first
# forward pass of its layer began
StepDone = Callable[[Step, float | None, float], None]


def silent(*_: object) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Reporting:
    """Where a run reports to: `report` is filled in, `progress` and `announce` are called."""

    report: Report
    progress: Progress = silent
    announce: Announce = silent

    def begins(self, samples: Samples, memory: ExpectedMemory) -> None:
        """The samples are there, and what they will take is known."""
        count = len(samples.input_ids)
        self.report.calibration = {"source": samples.source, "samples": count, "tokens": samples.tokens}
        self.report.expected_peak = memory.peak
        self.announce(
            f"calibrating with {count} samples, {samples.tokens:,} tokens: {samples.source}; "
            f"expected peak memory {memory.peak / 1e9:.1f} GB"
        )

    def layer_done(self, entry: dict) -> None:
        """A layer is committed; `entry` is what the job keeps of it."""
        self.report.layers += entry["modules"]
        self.report.decoder_layers.append({key: value for key, value in entry.items() if key != "modules"})

    def layer_done_before(self, entry: dict) -> None:
        """A layer was committed by an earlier run."""
        self.layer_done(entry)
        self.report.seconds += entry["seconds"]

    def within_layer(self, label: str, tokens: int) -> StepDone:
        """What to call with the steps of a layer. tokens: how many its weights are calibrated with."""

        def done(step: Step, error: float | None, seconds: float) -> None:
            self.progress(
                step,
                f"{label} {step.site.module.rpartition('.')[2]}"
                + (f" error {error:.4f}" if error is not None else "")
                + f", {tokens / seconds:,.0f} tokens/s, {peak_memory() / 1e9:.1f} GB",
            )

        return done
