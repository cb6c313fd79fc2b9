"""What a run will take on this machine: memory from shapes, time from a small piece of the same work."""

import time
from dataclasses import dataclass

import torch

from lowbit.discovery import decoder_layers
from lowbit.numerics.scheme import Recipe
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.computing import compute_dtype, rows_of_batches
from lowbit.quantization.memory import Shapes, expected_memory
from lowbit.quantization.plan import Plan, Step, statistics
from lowbit.quantizers import get_quantizer
from lowbit.system.memory import peak_memory

# Side of the square weight that is timed, and rows that it multiplies
_SIDE, _ROWS = 1024, 256
# A read and a write of a warm disk, bytes a second
_COPY_RATE = 1e9
# A stream goes through each layer once to collect and once with the quantized weights
_PASSES = 2


@dataclass(frozen=True)
class Forecast:
    """peak_ram_bytes: of the process (calibrated runs on a GPU: of its memory). disk_bytes: of the output, and of the
    finished layers that a job keeps beside it. seconds: an estimate, good to a factor of two."""

    peak_ram_bytes: int
    disk_bytes: int
    seconds: float


def forecast(plan: Plan, model, file_bytes: int, num_samples: int, seqlen: int) -> Forecast:
    """Of running `plan` here. model: the skeleton it was made with. file_bytes: the weight files it writes."""
    recipe = plan.recipe
    needs = statistics(recipe)
    copying = (plan.source_bytes + file_bytes) / _COPY_RATE
    if not needs and recipe.smooth is None:
        weights = sum(step.source.numel for step in plan.quantized)
        return Forecast(_streaming_peak(plan), file_bytes, copying + weights * _seconds_per_weight(recipe, needs))
    streams, tokens = 2 if "missing" in needs else 1, num_samples * seqlen
    kept = sum(info.nbytes for step in plan.quantized for info in step.outputs)
    seconds = copying + _measuring(plan, tokens, streams) + _solving(recipe, plan, needs)
    peak = _calibrated_peak(plan, model, (num_samples, seqlen), streams, "hessian" in needs)
    return Forecast(peak, file_bytes + kept, seconds)


def _streaming_peak(plan: Plan) -> int:
    """One tensor is read while the one before it is quantized and the one before that is written."""

    def made(step: Step) -> int:
        return sum(info.nbytes for info in step.outputs) + (step.source.numel if step.scheme is not None else 0)

    reading, working, writing = plan.steps, (None, *plan.steps), (None, None, *plan.steps)
    return peak_memory() + max(
        step.source.nbytes + (before.source.nbytes + made(before) if before else 0) + (made(last) if last else 0)
        for step, before, last in zip(reading, working, writing, strict=False)
    )


def _calibrated_peak(plan: Plan, model, samples: tuple[int, int], streams: int, hessians: bool) -> int:
    """samples: how many, and the tokens of each."""
    prefix, layers = decoder_layers(model)
    inside = [f"{prefix}.{number}." for number in range(len(layers))]
    groups = [[step for step in plan.quantized if step.site.parameter.startswith(start)] for start in inside]
    dtype, hidden_size = compute_dtype(model.config, Ranks.alone().device), model.config.get_text_config().hidden_size
    batches = [rows * samples[1] for rows in rows_of_batches(*samples)]
    shapes = Shapes(groups, streams, dtype.itemsize, hidden_size, batches, hessians)
    return expected_memory(shapes, None).peak


def _measuring(plan: Plan, tokens: int, streams: int) -> float:
    """Seconds of forward passes, and of summing Hessians: at most one for each linear, half of it by symmetry."""
    dense = [step for step in plan.quantized if not step.site.experts]
    passes = _PASSES * streams * tokens * sum(step.source.numel for step in plan.quantized)
    sums = tokens * sum(step.site.in_features**2 for step in dense) / 2
    return (passes + sums) / _multiplications_per_second()


def _solving(recipe: Recipe, plan: Plan, needs: tuple[str, ...]) -> float:
    """Seconds in the quantizer, whose work for a weight grows with the inputs that its error is spread over."""
    spread = sum(step.source.numel * step.site.in_features / _SIDE for step in plan.quantized)
    return spread * _seconds_per_weight(recipe, needs)


def _seconds_per_weight(recipe: Recipe, needs: tuple[str, ...]) -> float:
    """Of quantizing a random weight of _SIDE inputs here."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _SIDE, generator=rng)
    stats = {}
    if needs:
        x = torch.randn(2 * _SIDE, _SIDE, generator=rng).cumsum(1)  # neighbours are alike
        stats = {"hessian": x.T @ x / len(x), "missing": torch.zeros(_ROWS, _SIDE)}
    scheme = recipe.scheme.fitted(_SIDE).weight_only
    started = time.perf_counter()
    get_quantizer(recipe.method).quantize(weight, stats, scheme, recipe.options)
    return (time.perf_counter() - started) / weight.numel()


def _multiplications_per_second() -> float:
    first = torch.randn(_SIDE, _SIDE)
    first @ first  # threads and pages are there from now on
    started = time.perf_counter()
    first @ first
    return _SIDE**3 / (time.perf_counter() - started)
