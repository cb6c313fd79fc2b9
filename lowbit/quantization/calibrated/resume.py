"""Going on where an earlier run has stopped: its finished layers, and the hidden states behind them."""

import torch

from lowbit.calibration.recorded import recorded_edits, scaled
from lowbit.errors import InputError, UsageError
from lowbit.formats import get_format
from lowbit.numerics.grid import dequantize
from lowbit.numerics.scheme import names_module
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.calibrated.layer_run import LayerRun
from lowbit.quantization.calibrated.run_samples import drop_other_samples, keep_samples
from lowbit.quantization.calibrated.streams import NoStreams, Streams
from lowbit.quantization.calibrated.targets import targets
from lowbit.quantization.calibrated.turn import Work, load, reload, run_through, unload
from lowbit.quantization.plan import Plan, Step
from lowbit.text.samples import Samples


def resume(job: Job, plan: Plan, steps: list[list[Step]], samples: Samples, redo: str | None, ranks: Ranks) -> int:
    """Take over the layers that an earlier run has finished; the job holds them on every rank.

    Args:
        job: Of this run.
        plan: All that will be written.
        steps: What is quantized in each layer.
        samples: Of this run; they are kept, and those of others removed.
        redo: Regex of modules: their layers and all later ones are not taken over.
        ranks: The processes of the run.

    Returns:
        How many layers are finished.

    Raises:
        UsageError: `redo` matches nothing.
        OutputError: That run had other settings.
    """
    first_to_redo = None if redo is None else _first_matching(steps, redo)
    layers = [[info for step in layer for info in step.outputs] for layer in steps]

    def take_over() -> int:
        keep_samples(job.folder, samples)
        finished = job.resume(layers, plan.outputs, first_to_redo)
        drop_other_samples(job.folder, samples)
        return finished

    finished = ranks.of_first(take_over)
    if not ranks.first:
        job.take(finished)
    if first_to_redo is not None:
        job.drop_streams(-1, ranks.rank)  # the samples may be others
    return finished


def _first_matching(steps: list[list[Step]], redo: str) -> int:
    """The first layer in which something is quantized that `redo` names."""
    for number, layer in enumerate(steps):
        if any(names_module(redo, step.base) for step in layer):
            return number
    raise UsageError(f"--redo {redo!r} matches no quantized module")


def streams_before(work: Work, number: int, steps: list[list[Step]]) -> Streams | NoStreams:
    """The hidden states at the input of layer `number`: stored, or else made again with the finished layers."""
    stored = _stored_streams(work, number)
    if all(work.ranks.all_of(stored is not None)):
        return stored
    streams: Streams | NoStreams = NoStreams()
    for earlier in range(min(number, work.layers)):
        _load_finished(work, earlier, steps[earlier])
        run_through(work, LayerRun(work.models, earlier, work.batches, streams, keep=False))
        unload(work.models, earlier)
        streams = work.streams_before(earlier + 1)
        work.drop_streams_but(earlier + 1)
    return streams


def _stored_streams(work: Work, number: int) -> Streams | None:
    try:
        stored = work.streams_before(number)
        stored.check(work.job.stream_digest(number, work.ranks.rank))
    except (InputError, OSError):  # gone, cut or changed
        return None
    return stored


def _load_finished(work: Work, number: int, steps: list[Step]) -> None:
    """Load a finished layer: smoothed as it was, and quantized as it was in the model that is quantized."""
    quantized = work.models[0]
    tensors, names = load(work.models, number), quantized.names
    edits = recorded_edits([work.job.layers[number]["report"]], names, tensors, tensors.__getitem__)
    if edits:
        tensors = {name: scaled(name, tensor, edits, names) for name, tensor in tensors.items()}
        reload(work.models, number, tensors)
    fmt = get_format(work.plan.format_name)
    made = {step.source.name: work.job.made(step) for step in steps}
    for several in targets(steps, tensors, names, quantized.model).values():
        for target in several:
            step = target.step
            packed = {s: made[step.source.name][step.output_name(s)] for s in fmt.suffixes(step.scheme)}
            if len(step.source.shape) == 3:
                packed = {suffix: tensor[target.expert] for suffix, tensor in packed.items()}
            qweight = fmt.unpack_weight(packed, step.scheme, *target.weight.shape)
            target.view(quantized.model).copy_(dequantize(qweight, torch.float32))
