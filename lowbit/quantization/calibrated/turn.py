"""One layer's turn in a calibrated run: loaded, smoothed, quantized, run through, committed, unloaded."""

import gc
import time
from dataclasses import dataclass

import torch

from lowbit.checkpoint.checked import read_checked
from lowbit.formats import get_format
from lowbit.numerics.qweight import QuantWeight
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.calibrated.layer import quantize_layer
from lowbit.quantization.calibrated.layer_run import LayerRun
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.reporting import StepDone
from lowbit.quantization.calibrated.smoothing import Smoothed, Smoother
from lowbit.quantization.calibrated.streams import NoStreams, Streams, StreamsWriter
from lowbit.quantization.calibrated.targets import Target
from lowbit.quantization.plan import Plan, Step


@dataclass(frozen=True)
class Work:
    """What all layers of a run have in common.

    models: (quantized, original), or (quantized,) where nothing is compared with the original. batches: int64 [B, T]
    token ids of this rank. keep: leave forward passes open between the stages of a layer.
    """

    plan: Plan
    job: Job
    ranks: Ranks
    models: tuple[LayeredModel, ...]
    batches: list[torch.Tensor]
    keep: bool

    @property
    def layers(self) -> int:
        """How many decoder layers there are; the output embedding has the number behind them."""
        return len(self.models[0].layers)

    def streams_before(self, number: int) -> Streams:
        """The hidden states of this rank at the input of layer `number`, which must be there."""
        return Streams(self.job.streams(number, self.ranks.rank))

    def drop_streams_but(self, number: int) -> None:
        """Remove the hidden states of this rank at the input of all other layers."""
        self.job.drop_streams(number, self.ranks.rank)


def take_turn(
    work: Work, number: int, steps: list[Step], streams: Streams | NoStreams, done: StepDone
) -> tuple[dict, Streams | NoStreams]:
    """Quantize the `steps` of layer `number`, and commit them to the job.

    Args:
        work: What all layers have in common.
        number: Of the layer; the earlier ones are committed.
        steps: What is quantized in it.
        streams: The hidden states at its input.
        done: Called with each step that is quantized.

    Returns:
        What the job keeps of the layer, and the hidden states at the input of the next one.
    """
    started = time.perf_counter()
    smoothed = _smoothed(work, number, steps, streams)
    packer = _Packer(work.plan.format_name, steps, done)
    entry, digest = _quantized(work, number, steps, smoothed, streams, packer)
    unload(work.models, number)
    gc.collect()  # the frames of forward passes are in cycles, and hold activations
    entry["seconds"] = time.perf_counter() - started
    digests = work.ranks.all_of(digest)
    work.job.commit(packer.tensors() | smoothed.changed, entry, digests, write=work.ranks.first)
    work.ranks.wait()
    if number < work.layers:
        streams = work.streams_before(number + 1)
    work.drop_streams_but(number + 1)
    return entry, streams


def load(models: tuple[LayeredModel, ...], number: int) -> dict[str, torch.Tensor]:
    """Load a layer into each of the models; its tensors in the checkpoint, by name."""
    tensors = {name: read_checked(models[0].reader, name) for name in models[0].tensors_of(number)}
    reload(models, number, tensors)
    return tensors


def reload(models: tuple[LayeredModel, ...], number: int, tensors: dict[str, torch.Tensor]) -> None:
    """Load other tensors of a layer, of the same names."""
    for model in models:
        model.load(number, tensors)


def unload(models: tuple[LayeredModel, ...], number: int) -> None:
    """Free the parameters of a layer in each of the models."""
    for model in models:
        model.unload(number)


def run_through(work: Work, run: LayerRun) -> tuple[float | None, str]:
    """Write the hidden states behind the layer of `run`, as it computes them now.

    Returns:
        Their relative error over all ranks, None without an original to compare with, and the digest of those of this
        rank.
    """
    hidden_size = work.models[0].model.config.get_text_config().hidden_size
    shapes = [(*batch.shape, hidden_size) for batch in work.batches]
    folder = work.job.streams(run.number + 1, work.ranks.rank)
    with StreamsWriter(folder, shapes, len(work.models), work.models[0].dtype) as writer:
        distance, norm = run.finish(writer)
        digest = writer.commit()
    if len(work.models) == 1:
        return None, digest
    distances = work.ranks.all_of((distance, norm))
    error = (sum(d for d, _ in distances) / max(sum(n for _, n in distances), 1e-30)) ** 0.5
    return error, digest


def _smoothed(work: Work, number: int, steps: list[Step], streams: Streams | NoStreams) -> Smoothed:
    """Load a layer, scaled if that is asked for."""
    tensors = load(work.models, number)
    if work.plan.recipe.smooth is None or number == work.layers:
        return Smoothed(tensors)
    smoother = Smoother(work.plan, work.models[0], work.batches, work.ranks)
    smoothed = smoother.smooth(number, steps, tensors, streams)
    reload(work.models, number, smoothed.tensors)
    return smoothed


def _quantized(
    work: Work, number: int, steps: list[Step], smoothed: Smoothed, streams: Streams | NoStreams, packer: "_Packer"
) -> tuple[dict, str]:
    """Quantize a loaded layer, and run through it; what the job keeps of it, and the digest of the hidden states."""
    entry, digest = {"layer": number, "modules": packer.entries}, ""
    run = LayerRun(work.models, number, work.batches, streams, work.keep)
    try:
        quantize_layer(run, work.plan, steps, smoothed.tensors, work.ranks, packer.add)
        if smoothed.entries:
            entry["smoothing"] = smoothed.entries
        if number < work.layers:
            entry["output_error"], digest = run_through(work, run)
    finally:
        run.close()
    return entry, digest


class _Packer:
    """Collects the quantized matrices of a layer into the output tensors of its steps."""

    def __init__(self, format_name: str, steps: list[Step], done: StepDone):
        self._format, self._done = get_format(format_name), done
        self._parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {step.source.name: {} for step in steps}
        self._steps = {step.source.name: step for step in steps}
        self._started = time.perf_counter()
        self.entries: list[dict] = []

    def add(self, target: Target, qweight: QuantWeight, entry: dict) -> None:
        """Pack a matrix; `entry` is what the report says of it."""
        shape, parts = target.step.source.shape, self._parts[target.step.source.name]
        parts[target.expert or 0] = self._format.pack(qweight)
        self.entries.append(entry)
        if len(parts) == (shape[0] if len(shape) == 3 else 1):
            self._done(target.step, entry["output_error"], time.perf_counter() - self._started)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The output tensors by name; experts that are one tensor in the source are one again."""
        outputs = {}
        for name, parts in self._parts.items():
            step = self._steps[name]
            for suffix in parts[min(parts)]:
                stacked = [parts[expert][suffix] for expert in sorted(parts)]
                outputs[step.output_name(suffix)] = torch.stack(stacked) if len(step.source.shape) == 3 else stacked[0]
        return outputs
