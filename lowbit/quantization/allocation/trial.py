"""The real KL of one allocation as a calibrated run will make it: quantized behind what is quantized already.

Allocations are judged side by side, each weight quantized from what the original model gives it (`judge`). A run makes
up for the errors of earlier layers besides. This goes through the model once as the run does, by the same code, and
beside it with samples that are not calibrated with.
"""

from collections.abc import Callable, Sequence

import torch

from lowbit.checkpoint.checked import read_checked
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.allocation.judge import divergence, mean_and_error
from lowbit.quantization.allocation.layers import loaded
from lowbit.quantization.calibrated.layer import quantize_layer
from lowbit.quantization.calibrated.layer_run import LayerRun
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.streams import NoStreams
from lowbit.quantization.calibrated.targets import steps_by_layer
from lowbit.quantization.plan import Plan, Step, statistics


class _Kept:
    """Hidden states between two layers, in memory: few samples are enough here. As `Streams` and `StreamsWriter`."""

    def __init__(self):
        self._hidden: dict[int, list[torch.Tensor]] = {}

    def read(self, index: int) -> list[torch.Tensor]:
        return self._hidden[index]

    def write(self, index: int, hidden: list[torch.Tensor]) -> None:
        self._hidden[index] = hidden


def divergence_of_run(
    model: LayeredModel,
    plan: Plan,
    calibration: Sequence[torch.Tensor],
    batches: Sequence[torch.Tensor],
    advance: Callable[[str], None] = lambda what: None,
) -> tuple[float, float]:
    """The mean KL(model || result) of a calibrated run, in nats per token, and its standard error over batches.

    Args:
        model: The model, no layer loaded.
        plan: What becomes of its tensors; smoothing is left out.
        calibration: Token ids [B, T] that are calibrated with.
        batches: Others, that are judged on.
        advance: Told of each layer that is done.
    """
    models, layers = (model, model.twin()), len(model.layers)
    steps = steps_by_layer(plan, model)
    streams: NoStreams | _Kept = NoStreams()
    judged: list[list] = [[None] * len(batches) for _ in models]
    with torch.no_grad():
        for number in range(layers + 1):
            here = steps[number] if number < len(steps) else []
            with loaded(models[0], number, []), loaded(models[1], number, []):
                streams = _quantized(models, number, here, plan, calibration, streams)
                judged = [
                    [each.run(number, ids, h) for ids, h in zip(batches, hidden, strict=True)]
                    for each, hidden in zip(models, judged, strict=True)
                ]
            advance(f"layer {number + 1}/{layers}" if number < layers else "head")
    found = [divergence(original, made) / ids.numel() for made, original, ids in zip(*judged, batches, strict=True)]
    return mean_and_error(found, batches)


def _quantized(
    models: tuple[LayeredModel, ...],
    number: int,
    steps: list[Step],
    plan: Plan,
    calibration: Sequence[torch.Tensor],
    streams: NoStreams | _Kept,
) -> NoStreams | _Kept:
    """Quantize a loaded layer of the first model in place; the hidden states behind it."""
    compared = models if "missing" in statistics(plan.recipe) else models[:1]
    behind = _Kept()
    run = LayerRun(compared, number, list(calibration), streams, keep=True)
    try:
        tensors = {step.source.name: read_checked(models[0].reader, step.source.name) for step in steps}
        quantize_layer(run, plan, steps, tensors, Ranks.alone(), done=lambda *_: None)
        if number < len(models[0].layers):
            run.finish(behind)
    finally:
        run.close()
    return behind
