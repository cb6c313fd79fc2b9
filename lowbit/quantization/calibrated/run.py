"""The calibrated run: layer by layer, in the memory of one, each layer committed when it is done."""

from pathlib import Path

from lowbit.checkpoint import CheckpointReader
from lowbit.errors import OutputError
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.computing import compute_dtype, rows_of_batches
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.options import Calibration
from lowbit.quantization.calibrated.reporting import Reporting
from lowbit.quantization.calibrated.resume import resume, streams_before
from lowbit.quantization.calibrated.run_samples import samples_of_run
from lowbit.quantization.calibrated.targets import steps_by_layer
from lowbit.quantization.calibrated.turn import Work, take_turn
from lowbit.quantization.memory import Shapes, expected_memory
from lowbit.quantization.plan import Plan, statistics
from lowbit.system.memory import peak_memory


def calibrate(
    reader: CheckpointReader,
    config,
    plan: Plan,
    target: Path,
    overwrite: bool,
    calibration: Calibration,
    ranks: Ranks,
    reporting: Reporting,
) -> Job:
    """Quantize the decoder layers of `plan`.

    Args:
        reader: Of the checkpoint.
        config: Of the model, as transformers has it.
        plan: What becomes of its tensors.
        target: The output folder; what is finished is kept beside it.
        overwrite: Whether an unfinished run with other settings is begun anew.
        calibration: What to calibrate with.
        ranks: The processes of this run, all of which call this.
        reporting: Silent on all ranks but the first, apart from the report.

    Returns:
        The job that holds the quantized layers.

    Raises:
        OutputError: The job folder belongs to other settings, or cannot be written.
        InputError: The model, or the data.
    """
    identity = _identity(reader, config, plan, calibration, ranks)
    if not ranks.first:
        ranks.wait()  # the folder is the first one's to make, or to refuse
    job = Job(target, identity, overwrite=overwrite and calibration.redo is None, owner=ranks.first)
    try:
        if ranks.first:
            ranks.wait()
        _quantize_layers(reader, config, plan, job, calibration, ranks, reporting)
    except OSError as error:  # readers raise InputError: this is a write that failed
        job.close()
        raise OutputError(f"cannot write to {job.folder}: {error.strerror or error}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit) and job.layers:
            reporting.announce(f"{len(job.layers)} finished layer(s) are kept: the same command goes on from there")
        job.close()
        raise
    return job


def _identity(reader: CheckpointReader, config, plan: Plan, calibration: Calibration, ranks: Ranks) -> dict:
    """What the result depends on: only a run with the same goes on from finished layers."""
    # size and time of each file of the source: content would take as long to read as the run does to start
    files = [reader.folder / "config.json", *reader.files]
    return {
        "recipe": plan.recipe.to_dict(),
        "format": plan.format_name,
        "source": {file.name: f"{file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in files},
        "calibration": calibration.to_dict(),
        "processes": ranks.world,
        "computing": f"{ranks.device.type} {compute_dtype(config, ranks.device)}",
    }


def _quantize_layers(
    reader: CheckpointReader,
    config,
    plan: Plan,
    job: Job,
    calibration: Calibration,
    ranks: Ranks,
    reporting: Reporting,
) -> None:
    """Quantize the decoder layers that the job does not hold yet, and the output embedding behind them if it is."""
    samples = samples_of_run(reader.folder, config, job, calibration, ranks, reporting.announce)
    job.identity["tokens"] = samples.digest
    mine = samples.input_ids[ranks.share_of(len(samples.input_ids))]
    batches = list(mine.split(rows_of_batches(*mine.shape)))
    dtype, needs = compute_dtype(config, ranks.device), statistics(plan.recipe)
    model = LayeredModel(config, reader, samples.input_ids, dtype, ranks.device, calibration.trust_remote_code)
    models = (model, model.twin()) if "missing" in needs else (model,)
    steps = steps_by_layer(plan, model)
    shapes = Shapes(
        steps, len(models), dtype.itemsize, config.get_text_config().hidden_size,
        [batch.numel() for batch in batches], "hessian" in needs,
    )  # fmt: skip
    memory = expected_memory(shapes, calibration.max_memory)
    reporting.begins(samples, memory)
    finished = resume(job, plan, steps, samples, calibration.redo, ranks)
    if finished:
        reporting.announce(f"going on from layer {finished + 1} of {len(steps)}")
    for layer in job.layers:
        reporting.layer_done_before(layer["report"])
    if finished < len(steps):
        work = Work(plan, job, ranks, models, batches, memory.keep)
        streams = streams_before(work, finished, steps)
        for number in range(finished, len(steps)):
            done = reporting.within_layer(f"layer {number + 1}/{len(steps)}", samples.tokens)
            entry, streams = take_turn(work, number, steps[number], streams, done)
            reporting.layer_done(entry)
    reporting.report.peak_memory = max(ranks.all_of(peak_memory()))
