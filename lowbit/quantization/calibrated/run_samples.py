"""The calibration samples of a run, kept beside its finished layers: a run that goes on uses the same ones."""

from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lowbit.errors import InputError, UsageError
from lowbit.guards.safe_files import remove, write_whole
from lowbit.options import DrawnSampleOptions
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.calibrated.options import Calibration
from lowbit.quantization.calibrated.reporting import Announce
from lowbit.text.samples import Samples, calibration_samples, checked_ids


def samples_of_run(
    model: Path, config, job: Job, calibration: Calibration, ranks: Ranks, announce: Announce
) -> Samples:
    """Those of the run that is resumed, or else new ones; the same on every rank.

    Raises UsageError for fewer samples than processes.
    """
    language_model = config.get_text_config()

    def make() -> Samples:
        stored = _stored(job, calibration, language_model.vocab_size)
        return stored or calibration_samples(
            calibration.dataset,
            model,
            **{each.name: getattr(calibration, each.name) for each in fields(DrawnSampleOptions)},
            vocabulary=language_model.vocab_size,
            context=getattr(language_model, "max_position_embeddings", None),
            trust_remote_code=calibration.trust_remote_code,
            announce=announce,
        )

    samples = ranks.of_first(make)
    if len(samples.input_ids) < ranks.world:
        raise UsageError(f"{len(samples.input_ids)} samples are too few for {ranks.world} processes")
    return samples


def keep_samples(folder: Path, samples: Samples) -> None:
    """Store them in the folder of a job, if they are not there yet."""
    path = _file(folder, samples.digest)
    if not path.is_file():
        write_whole(path, save({"input_ids": samples.input_ids}, {"source": samples.source}))


def drop_other_samples(folder: Path, samples: Samples) -> None:
    """Remove those of earlier runs from the folder of a job."""
    for path in folder.glob("samples-*"):
        if path != _file(folder, samples.digest):
            remove(path)


def _file(folder: Path, digest: str) -> Path:
    """Named after what it holds: a run that is refused, or killed here, damages nothing of an earlier one."""
    return folder / f"samples-{digest[:16]}.safetensors"


def _stored(job: Job, calibration: Calibration, vocabulary: int) -> Samples | None:
    """Load the samples of an unfinished run with the same options, but for token ids: a caller gives those again."""
    then = job.stored.get("identity", {})
    digest = then.get("tokens", "")
    path = _file(job.folder, digest)
    if then.get("calibration") != calibration.to_dict() or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            ids, source = file.get_tensor("input_ids"), file.metadata()["source"]
        samples = Samples(checked_ids(ids, vocabulary, str(path)), source)
    except (SafetensorError, InputError, OSError, KeyError, TypeError):  # damaged: they are made again
        return None
    return samples if samples.digest == digest and samples.source != "token ids" else None
