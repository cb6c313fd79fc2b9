"""The calibrated pipeline: layer by layer, in the memory of one, each layer committed when it is done.

Prepares what `calibrated` works on: samples, the two models, their streams of hidden states, and the job that survives
the process.
"""

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lowbit.calibration.recorded import recorded_edits, scaled
from lowbit.checkpoint import CheckpointReader
from lowbit.errors import InputError, OutputError, UsageError
from lowbit.formats import get_format
from lowbit.guards.safe_files import remove, write_whole
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Recipe, names_module
from lowbit.quantization.calibrated.job import Job
from lowbit.quantization.calibrated.layer import LayerRun, quantize_layer
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.ranks import Ranks
from lowbit.quantization.calibrated.smoothing import Smoothed, Smoother
from lowbit.quantization.calibrated.streams import NoStreams, Streams, StreamsWriter
from lowbit.quantization.calibrated.targets import Target, targets
from lowbit.quantization.memory import expected_peak, held_between_stages
from lowbit.quantization.plan import Plan, Step, statistics
from lowbit.quantization.report import Report
from lowbit.quantization.write import Progress, read_checked
from lowbit.system.memory import available_memory, peak_memory
from lowbit.text.samples import Samples, calibration_samples, checked_ids
from lowbit.torch_api import cpu_has_bf16_products

# Tokens in one forward pass: enough for matrix products to run at full speed
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with, as `quantize` is asked for it. max_memory: bytes, None for half of what is free."""

    dataset: object = None
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    redo: str | None = None
    max_memory: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("seqlen", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
        try:
            re.compile(self.redo or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{self.redo!r} is not a regular expression: {error}") from None

    def to_dict(self) -> dict:
        """What a job remembers of it; of a local file also when it was changed."""
        named = self.dataset is None or isinstance(self.dataset, str | Path)
        dataset = str(self.dataset) if named else "token ids"
        if named and Path(dataset).is_file():
            dataset += f" of {Path(dataset).stat().st_mtime_ns}"
        return {"dataset": dataset, "num_samples": self.num_samples, "seqlen": self.seqlen, "seed": self.seed}


def calibrate(
    reader: CheckpointReader, config, plan: Plan, target: Path, overwrite: bool, calibration: Calibration, ranks: Ranks,
    report: Report, progress: Progress | None, announce: Callable[[str], None],
) -> Job:  # fmt: skip
    """Quantize the decoder layers of `plan`. The job that holds them; `report` is filled in.

    Raises OutputError for a job folder that belongs to other settings, InputError for the model or the data.
    """
    announce = announce if ranks.first else _silent
    device, dtype = ranks.device, compute_dtype(config, ranks.device)
    identity = {
        "recipe": plan.recipe.to_dict(),
        "format": plan.format_name,
        "source": _fingerprint(reader),
        "calibration": calibration.to_dict(),
        "processes": ranks.world,
        "computing": f"{device.type} {dtype}",
    }
    if not ranks.first:
        ranks.wait()  # the folder is the first one's to make, or to refuse
    job = Job(target, identity, overwrite=overwrite and calibration.redo is None, owner=ranks.first)
    try:
        if ranks.first:
            ranks.wait()
        loop = _LayerLoop(reader, config, plan, job, calibration, ranks, device, dtype, announce)
        loop.run(progress or _silent, report)
    except OSError as error:  # of writing: what reads says itself what it could not read
        job.close()
        raise OutputError(f"cannot write to {job.folder}: {error.strerror or error}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit) and job.layers:
            announce(f"{len(job.layers)} finished layer(s) are kept: the same command goes on from there")
        job.close()
        raise
    return job


def _silent(*_) -> None:
    pass


def needs_data(recipe: Recipe) -> bool:
    """Whether a run goes through the layers with calibration samples."""
    return bool(statistics(recipe)) or recipe.smooth is not None


def compute_dtype(config, device: torch.device) -> torch.dtype:
    """What layers compute in: the model's dtype where the hardware multiplies it, else float32."""
    stored = getattr(config, "dtype", None) or torch.float32
    if device.type != "cpu":
        return stored
    return stored if stored == torch.bfloat16 and cpu_has_bf16_products() else torch.float32


def _fingerprint(reader: CheckpointReader) -> dict:
    """Size and time of each file of the source: content would take as long to read as the run does to start."""
    files = [reader.folder / "config.json", *reader.files]
    return {file.name: f"{file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in files}


class _LayerLoop:
    """The loop over the decoder layers, and over the output embedding behind them where it is quantized."""

    def __init__(self, reader, config, plan: Plan, job: Job, calibration: Calibration, ranks: Ranks, device, dtype,
                 announce):  # fmt: skip
        self.reader, self.config, self.plan, self.job = reader, config, plan, job
        self.calibration, self.ranks, self.announce = calibration, ranks, announce
        self.device, self.dtype = device, dtype

    def run(self, progress: Progress, report: Report) -> None:
        samples = self._samples()
        report.calibration = {"source": samples.source, "samples": len(samples.input_ids), "tokens": samples.tokens}
        mine = samples.input_ids[self.ranks.share_of(len(samples.input_ids))]
        batches = list(mine.split(max(1, _BATCH_TOKENS // mine.shape[1])))
        quantized = LayeredModel(
            self.config, self.reader, samples.input_ids, self.dtype, self.device, self.calibration.trust_remote_code
        )
        wanted = statistics(self.plan.recipe)
        models = (quantized, quantized.twin()) if "missing" in wanted else (quantized,)
        steps = self._steps_by_layer(quantized)
        size, hidden = self.dtype.itemsize, quantized.model.config.get_text_config().hidden_size
        report.expected_peak = expected_peak(steps, len(models), size, "hessian" in wanted)
        held = held_between_stages(steps, mine.numel(), len(models), size, hidden)
        allowed = self.calibration.max_memory or peak_memory() + available_memory() // 2
        keep = report.expected_peak + held <= allowed
        report.expected_peak += held if keep else held // len(batches)
        self.announce(
            f"calibrating with {len(samples.input_ids)} samples, {samples.tokens:,} tokens: {samples.source}; "
            f"expected peak memory {report.expected_peak / 1e9:.1f} GB"
        )
        finished = self._resume(steps, samples)
        for entry in self.job.layers:
            _report_layer(report, entry["report"])
            report.seconds += entry["report"]["seconds"]  # of an earlier run
        streams, smoother = NoStreams(), Smoother(self.plan, quantized, batches, self.ranks)
        if finished < len(steps):
            streams = self._streams(finished, models, steps, batches)
        for number in range(finished, len(steps)):
            started = time.perf_counter()
            smoothed = self._smoothed(number, steps[number], models, smoother, streams)
            run = LayerRun(models, number, batches, streams, keep)
            packer = _Packer(self.plan, steps[number], progress, f"layer {number + 1}/{len(steps)}", samples.tokens)
            try:
                quantize_layer(run, self.plan, steps[number], smoothed.tensors, self.ranks, packer.add)
                entry, digest = {"layer": number, "modules": packer.entries}, ""
                if smoothed.entries:
                    entry["smoothing"] = smoothed.entries
                if number < len(quantized.layers):
                    entry["output_error"], digest = self._advance(run, number + 1, batches)
            finally:
                run.close()
            for model in models:
                model.unload(number)
            del run
            gc.collect()  # the frames of forward passes are in cycles, and hold activations
            entry["seconds"] = time.perf_counter() - started
            digests = self.ranks.all_of(digest)
            self.job.commit(packer.tensors() | smoothed.changed, entry, digests, write=self.ranks.first)
            self.ranks.wait()
            if number < len(quantized.layers):
                streams = Streams(self.job.streams(number + 1, self.ranks.rank))
            self.job.drop_streams(number + 1, self.ranks.rank)
            _report_layer(report, entry)
        report.peak_memory = max(self.ranks.all_of(peak_memory()))

    def _samples(self) -> Samples:
        """The calibration samples: those of the run that is resumed, or new ones."""
        then = self.job.stored.get("identity", {})
        wanted, language_model = self.calibration, self.config.get_text_config()

        def make() -> Samples:
            stored = self._samples_file(then.get("tokens", ""))
            if then.get("calibration") == wanted.to_dict() and stored.is_file():
                samples = _load_samples(stored, language_model.vocab_size)
                if samples is not None and samples.digest == then.get("tokens") and samples.source != "token ids":
                    return samples
            return calibration_samples(
                wanted.dataset, self.reader.folder, num_samples=wanted.num_samples, seqlen=wanted.seqlen,
                seed=wanted.seed, vocabulary=language_model.vocab_size,
                context=getattr(language_model, "max_position_embeddings", None),
                trust_remote_code=wanted.trust_remote_code,
                announce=self.announce,
            )  # fmt: skip

        samples = self.ranks.of_first(make)
        if len(samples.input_ids) < self.ranks.world:
            raise UsageError(f"{len(samples.input_ids)} samples are too few for {self.ranks.world} processes")
        self.job.identity["tokens"] = samples.digest
        return samples

    def _samples_file(self, digest: str) -> Path:
        """Named after what it holds: a run that is refused, or killed here, damages nothing of an earlier one."""
        return self.job.folder / f"samples-{digest[:16]}.safetensors"

    def _take_over(self, first_to_redo: int | None, steps: list[list[Step]], samples: Samples) -> int:
        path = self._samples_file(samples.digest)
        if not path.is_file():
            write_whole(path, save({"input_ids": samples.input_ids}, {"source": samples.source}))
        layers = [[info for step in layer for info in step.outputs] for layer in steps]
        finished = self.job.resume(layers, self.plan.outputs, first_to_redo)
        for other in self.job.folder.glob("samples-*"):
            if other != path:
                remove(other)
        return finished

    def _steps_by_layer(self, model: LayeredModel) -> list[list[Step]]:
        """The steps that are quantized in each decoder layer; behind them the output embedding, if it is."""
        layers: list[list[Step]] = [[] for _ in model.layers]
        head = []
        for step in self.plan.quantized:
            if step.site.kind == "experts" and not step.site.routed:
                continue  # nothing is known of how tokens get to these experts: they are quantized without data
            parameter, _ = model.names.locate(step.source.name)
            number = model.layer_of(parameter)
            if number is not None:
                layers[number].append(step)
            elif model.is_head(parameter):
                head.append(step)
            elif step.scheme.is_static:
                raise InputError(
                    f"{step.base} lies outside of the decoder layers, where calibration does not see its inputs: leave "
                    "it alone with --ignore, or give it a dynamic scheme with --override"
                )
        return layers + ([head] if head else [])

    def _resume(self, steps: list[list[Step]], samples: Samples) -> int:
        """How many layers are finished already."""
        first = None
        if self.calibration.redo is not None:
            matching = [
                i for i, layer in enumerate(steps) for s in layer if names_module(self.calibration.redo, s.base)
            ]
            if not matching:
                raise UsageError(f"--redo {self.calibration.redo!r} matches no quantized module")
            first = min(matching)
        finished = self.ranks.of_first(lambda: self._take_over(first, steps, samples))
        if not self.ranks.first:
            self.job.take(finished)
        if first is not None:
            self.job.drop_streams(-1, self.ranks.rank)  # the samples may be others
        if finished:
            self.announce(f"going on from layer {finished + 1} of {len(steps)}")
        return finished

    def _load(self, number: int, models: tuple[LayeredModel, ...]) -> dict[str, torch.Tensor]:
        tensors = {name: read_checked(self.reader, name) for name in models[0].tensors_of(number)}
        for model in models:
            model.load(number, tensors)
        return tensors

    def _smoothed(
        self, number: int, steps: list[Step], models: tuple[LayeredModel, ...], smoother: Smoother, streams
    ) -> Smoothed:
        """A layer, loaded, and its tensors: scaled if that is asked for."""
        tensors = self._load(number, models)
        if self.plan.recipe.smooth is None or number == len(models[0].layers):
            return Smoothed(tensors)
        smoothed = smoother.smooth(number, steps, tensors, streams)
        for model in models:
            model.load(number, smoothed.tensors)
        return smoothed

    def _as_finished(self, number: int, models: tuple[LayeredModel, ...]) -> dict[str, torch.Tensor]:
        """The tensors of a finished layer as they were quantized, loaded."""
        tensors, names = self._load(number, models), models[0].names
        edits = recorded_edits([self.job.layers[number]["report"]], names, tensors, tensors.__getitem__)
        if edits:
            tensors = {name: scaled(name, tensor, edits, names) for name, tensor in tensors.items()}
            for model in models:
                model.load(number, tensors)
        return tensors

    def _streams(self, number: int, models: tuple[LayeredModel, ...], steps, batches) -> Streams | NoStreams:
        """The hidden states at the input of layer `number`: stored, or else made again with the finished layers."""
        streams = NoStreams()
        try:
            stored = Streams(self.job.streams(number, self.ranks.rank))
            stored.check(self.job.stream_digest(number, self.ranks.rank))
        except (InputError, OSError):  # gone, cut or changed
            stored = None
        if all(self.ranks.all_of(stored is not None)):
            return stored
        for earlier in range(min(number, len(models[0].layers))):
            tensors = self._as_finished(earlier, models)
            made = {step.source.name: self.job.made(step) for step in steps[earlier]}
            _replace(models[0], steps[earlier], tensors, made, self.plan)
            run = LayerRun(models, earlier, batches, streams, keep=False)
            self._advance(run, earlier + 1, batches)
            for model in models:
                model.unload(earlier)
            streams = Streams(self.job.streams(earlier + 1, self.ranks.rank))
            self.job.drop_streams(earlier + 1, self.ranks.rank)
        return streams

    def _advance(self, run: LayerRun, number: int, batches) -> tuple[float | None, str]:
        """Write the hidden states at the input of layer `number`: their relative error, where that is known, and the
        digest of those of this rank."""
        hidden_size = self.config.get_text_config().hidden_size
        shapes = [(*batch.shape, hidden_size) for batch in batches]
        with StreamsWriter(self.job.streams(number, self.ranks.rank), shapes, len(run.models), self.dtype) as writer:
            distance, norm = run.finish(writer)
            digest = writer.commit()
        if len(run.models) == 1:
            return None, digest
        distances = self.ranks.all_of((distance, norm))
        error = (sum(d for d, _ in distances) / max(sum(n for _, n in distances), 1e-30)) ** 0.5
        return error, digest


def _load_samples(path: Path, vocabulary: int) -> Samples | None:
    try:
        with safe_open(path, "pt") as file:
            ids, source = file.get_tensor("input_ids"), file.metadata()["source"]
        return Samples(checked_ids(ids, vocabulary, str(path)), source)
    except (SafetensorError, InputError, OSError, KeyError, TypeError):  # damaged: they are made again
        return None


def _replace(quantized: LayeredModel, steps: list[Step], tensors: dict, made: dict, plan: Plan) -> None:
    """Put the weights that an earlier run has quantized into a loaded layer."""
    fmt = get_format(plan.format_name)
    for several in targets(steps, tensors, quantized.names, quantized.model).values():
        for target in several:
            step = target.step
            packed = {s: made[step.source.name][step.output_name(s)] for s in fmt.suffixes(step.scheme)}
            if len(step.source.shape) == 3:
                packed = {suffix: tensor[target.expert] for suffix, tensor in packed.items()}
            qweight = fmt.unpack_weight(packed, step.scheme, *target.weight.shape)
            target.view(quantized.model).copy_(dequantize(qweight, torch.float32))


class _Packer:
    """Collects the quantized targets of a layer into output tensors; says what is done."""

    def __init__(self, plan: Plan, steps: list[Step], progress: Progress, label: str, tokens: int):
        self._format, self._progress, self._label, self._tokens = get_format(plan.format_name), progress, label, tokens
        self._parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {step.source.name: {} for step in steps}
        self._steps = {step.source.name: step for step in steps}
        self._started = time.perf_counter()
        self.entries: list[dict] = []

    def add(self, target: Target, qweight: QuantWeight, entry: dict) -> None:
        parts = self._parts[target.step.source.name]
        parts[target.expert or 0] = self._format.pack(qweight)
        self.entries.append(entry)
        if len(parts) == (target.step.source.shape[0] if len(target.step.source.shape) == 3 else 1):
            rate = self._tokens / (time.perf_counter() - self._started)
            error = entry["output_error"]
            self._progress(
                target.step,
                f"{self._label} {target.step.site.module.rpartition('.')[2]}"
                + (f" error {error:.4f}" if error is not None else "")
                + f", {rate:,.0f} tokens/s, {peak_memory() / 1e9:.1f} GB",
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        outputs = {}
        for name, parts in self._parts.items():
            step = self._steps[name]
            for suffix in parts[min(parts)]:
                stacked = [parts[expert][suffix] for expert in sorted(parts)]
                outputs[step.output_name(suffix)] = torch.stack(stacked) if len(step.source.shape) == 3 else stacked[0]
        return outputs


def _report_layer(report: Report, entry: dict) -> None:
    report.layers += entry["modules"]
    report.decoder_layers.append({key: value for key, value in entry.items() if key != "modules"})
