"""Quantizing one decoder layer from what its linears receive.

Two streams of hidden states run through the model: that of the quantized one and, for quantizers that compare with it,
that of the original one. In a layer, the forward passes of both go from stage to stage; at each, the moments of the
inputs are summed over all batches (and ranks), the weights of the stage are quantized and replaced in place, and the
passes go on with the quantized weights.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lowbit.calibration.moments import Moments
from lowbit.calibration.outputs import Output, gains_of
from lowbit.calibration.staged_pass import Stage, expert_input
from lowbit.errors import InputError
from lowbit.numerics.activations import RangeObserver
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.reference import weight_error
from lowbit.numerics.scheme import Recipe
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.layer_run import LayerRun
from lowbit.quantization.calibrated.targets import Target, targets
from lowbit.quantization.plan import Plan, Step, statistics
from lowbit.quantization.report import layer_entry
from lowbit.quantizers import get_quantizer
from lowbit.system.memory import return_freed

# An expert that saw fewer tokens than this is shown others, that were routed elsewhere
_FEWEST_TOKENS = 256

# A norm behind a linear is tried on so many random outputs
_TRIED_TOKENS = 16

# Called with a target that is done, what became of it, and its entry of the report
Done = Callable[[Target, QuantWeight, dict], None]


def quantize_layer(run: LayerRun, plan: Plan, steps: list[Step], tensors: dict, ranks: Ranks, done: Done) -> None:
    """Quantize the `steps` of a layer from its stored `tensors`; `done` gets each target, its QuantWeight and its entry
    of the report."""
    todo = targets(steps, tensors, run.quantized.names, run.quantized.model)
    for number, stage in enumerate(run.find_stages(list(todo))):
        for together, seen in _measured(run, number, stage, todo, ranks, statistics(plan.recipe)):
            kinds = _alike(together)
            for alike in kinds:
                _quantize_together(alike, seen, plan, run, ranks, done, last=alike is kinds[-1])
        for name in stage.parameters:
            del todo[name]
    for name in list(todo):  # never used in the forward pass: nothing was measured
        for target in todo[name]:
            _quantize_together([target], Seen(None), plan, run, ranks, done, last=True)


@dataclass(frozen=True)
class Seen:
    """What was measured of an input. moments: None where the forward pass does not use it. ranges: of the quantized
    stream, which is what static activations will meet. routed: how many tokens a router sent there."""

    moments: Moments | None
    ranges: RangeObserver | None = None
    routed: int | None = None

    def input_grid(self, target: Target, recipe: Recipe) -> dict[str, torch.Tensor | None]:
        """The grid of the inputs of `target` as `QuantWeight.with_inputs` takes it. Raises InputError if it is static,
        and no token came by."""
        if not target.step.scheme.is_static:
            return {}
        if self.ranges is None or self.ranges.is_empty:
            raise InputError(
                f"no calibration token reached {target.step.base}, so the range of its inputs is unknown: give it more "
                "samples, leave it alone with --ignore, or give it a dynamic scheme with --override"
            )
        # rounded to what the other scales are stored in: readers keep all of them in one dtype
        grid = self.ranges.grid(recipe.activation_range, target.step.scheme.activations, target.weight.dtype)
        return {"scale": grid[0].float(), "zero": grid[1]}


def _measured(
    run: LayerRun, number: int, stage: Stage, todo: dict[str, list[Target]], ranks: Ranks, wanted: tuple[str, ...]
):
    """(targets that share an input, what was Seen of it) for each input of a stage. wanted: as in `Moments`."""
    if stage.experts is None:
        together = [target for name in stage.parameters for target in todo[name]]
        output = _single_output(run, number, together)
        moments = Moments(together[0].weight.shape[1], run.quantized.device, wanted, output)
        ranges = RangeObserver() if any(target.step.scheme.is_static for target in together) else None
        for arrived in run.arrivals(number):
            moments.add(*(None if tensor is None else tensor.flatten(0, -2) for tensor in arrived))
            if ranges is not None:
                _observe(ranges, arrived[0], together[0])
        return_freed()
        moments.merge(ranks.sum)
        moments.finish()
        yield together, Seen(moments, None if ranges is None else _merged(ranges, ranks))
        return
    inputs = [_of_experts(*arrived) for *arrived, _ in run.arrivals(number)]
    modules = [model.model.get_submodule(stage.experts) for model in (run.models[0], run.models[-1])]
    seen = sum(
        torch.bincount(routing.flatten().cpu(), minlength=modules[0].num_experts + 1) for _, _, routing in inputs
    )
    ranks.sum(seen)
    for expert in range(modules[0].num_experts):
        missing = max(0, _FEWEST_TOKENS - int(seen[expert])) // ranks.world
        for name in stage.parameters:
            together = [target for target in todo[name] if target.expert == expert]
            moments = Moments(together[0].weight.shape[1], run.quantized.device, wanted)
            for x, f, routing in inputs:
                rows = _tokens_of(expert, routing, -(-missing // len(inputs)))
                if len(rows):
                    leaf = name.rpartition(".")[2]
                    moments.add(*(
                        expert_input(module, getattr(module, leaf), expert, hidden[rows], routing)
                        for module, hidden in zip(modules, (x, f), strict=True)
                    ))  # fmt: skip
            moments.merge(ranks.sum)
            moments.finish()
            yield together, Seen(moments, routed=int(seen[expert]))


def _single_output(run: LayerRun, number: int, together: list[Target]) -> Output | None:
    """That of a linear which alone reads its input and has few outputs, with what lies behind it."""
    weight, device = together[0].weight, run.quantized.device
    if len(together) > 1 or weight.shape[0] > weight.shape[1]:
        return None
    weight, norm = weight.to(device), run.norm_behind(number)
    if norm is None:
        return Output(weight)
    examples = torch.randn(_TRIED_TOKENS, len(weight), generator=torch.Generator().manual_seed(0))
    gains = gains_of(norm, examples.to(device, run.quantized.dtype))
    return Output(weight, None if gains is None else norm, gains)


def _observe(ranges: RangeObserver, x: torch.Tensor, target: Target) -> None:
    try:
        ranges.add(x)
    except ValueError as error:
        raise InputError(f"the inputs of {target.step.base} in the calibration are {error}") from None


def _merged(ranges: RangeObserver, ranks: Ranks) -> RangeObserver:
    merged = RangeObserver()
    for part in ranks.all_of(ranges):
        merged.merge(part)
    return merged


def _of_experts(quantized: tuple, original: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [tokens, hidden] of both streams, and the experts [tokens, k] that the quantized one chose."""
    x, f = (next(a for a in args if torch.is_floating_point(a)).flatten(0, -2) for args in (quantized, original))
    routing = next(a for a in quantized if isinstance(a, torch.Tensor) and not torch.is_floating_point(a))
    return x, f, routing.reshape(len(x), -1)


def _tokens_of(expert: int, routing: torch.Tensor, missing: int) -> torch.Tensor:
    """Rows of the tokens routed to `expert`, and `missing` others spread evenly."""
    mine = (routing == expert).any(-1)
    rows = mine.nonzero()[:, 0]
    if not missing:
        return rows
    others = (~mine).nonzero()[:, 0]
    return torch.cat([rows, others[:: max(1, len(others) // missing)][:missing]])


def _alike(together: list[Target]) -> list[list[Target]]:
    """Targets of one scheme and dtype: their rows are quantized as one matrix."""
    kinds: dict[tuple, list[Target]] = {}
    for target in together:
        kinds.setdefault((target.step.scheme, target.weight.dtype), []).append(target)
    return list(kinds.values())


def _quantize_together(
    alike: list[Target], seen: Seen, plan: Plan, run: LayerRun, ranks: Ranks, done: Done, last: bool
) -> None:
    started = time.perf_counter()
    moments, routed = seen.moments, seen.routed
    grid = seen.input_grid(alike[0], plan.recipe)
    note = _note(moments, routed)
    scheme, weight = alike[0].step.scheme, torch.cat([target.weight for target in alike])
    share = ranks.share_of(len(weight))
    mine = weight[share].to(run.quantized.device)
    if moments is None or not moments.tokens:
        quantizer, options, stats = get_quantizer("rtn"), {"scale_search": "mse"}, {}
    else:
        quantizer, options = get_quantizer(plan.recipe.method), plan.recipe.options
        stats = {
            "hessian": moments.hessian,
            "missing": moments.missing(weight, share),
            "judge": moments.judge(weight, ranks.all_of, share),
        }
        if last:
            moments.forget()  # it is the quantizer's now, who frees it
    parts = ranks.all_of(quantizer.quantize(mine, stats, scheme.weight_only, options))
    whole = _joined([part for part, _ in parts])
    notes = [notes for _, notes in parts]
    seconds = (time.perf_counter() - started) * len(alike[0].weight) / len(weight)
    for target, rows in zip(alike, _consecutive(alike), strict=True):
        qweight = whole.rows(rows.start, rows.stop).with_inputs(scheme, **grid)
        entry = {
            **layer_entry(target.step, target.expert),
            "error": weight_error(target.weight, qweight),
            "tokens": moments.tokens if moments else 0,
            "moved": _moved(notes, rows, target.weight),
            "damping": notes[0].get("damping"),
            "drift": notes[0].get("drift"),
            "objective": _objective(notes, rows),
            "seconds": seconds,
            "note": notes[0].get("fallback", note),
            **_output_errors(target.weight, qweight, moments, ranks),
        }
        entry["rounding_error"] = _rounding_error(notes, rows, entry["output_error"])
        if len(run.models) == 1:
            entry["output_error_to_original"] = None
        if target.expert is not None:
            entry |= {"expert": target.expert, "routed": routed}
        target.view(run.quantized.model).copy_(dequantize(qweight, torch.float32))
        done(target, qweight, entry)


def _note(moments: Moments | None, routed: int | None) -> str:
    if routed is not None and routed < _FEWEST_TOKENS:
        return f"cold expert: {routed} tokens of its own, topped up"
    return "" if moments is not None and moments.tokens else "no token reached it"


def _consecutive(alike: list[Target]) -> Iterator[slice]:
    start = 0
    for target in alike:
        yield slice(start, start + len(target.weight))
        start += len(target.weight)


def _joined(parts: list[QuantWeight]) -> QuantWeight:
    """The rows of all ranks, on the CPU."""

    def on_cpu(part: QuantWeight) -> QuantWeight:
        zeros = None if part.zeros is None else part.zeros.cpu()
        return replace(part, codes=part.codes.cpu(), scales=part.scales.cpu(), zeros=zeros)

    return QuantWeight.concatenated([on_cpu(part) for part in parts])


def _objective(notes: list[dict], rows: slice) -> dict[str, float]:
    """Stage -> the error of these rows after it, relative to their energy."""
    stages = notes[0].get("objective", {})
    return {stage: float(torch.cat([n["objective"][stage].cpu() for n in notes])[rows].mean()) for stage in stages}


def _rounding_error(notes: list[dict], rows: slice, otherwise: float | None) -> float | None:
    """Relative output error ||Q x - T x|| / ||T x|| against the weight T that these rows were moved to before they were
    rounded: what rounding costs, without what moving them makes up for. otherwise: of a weight that was not moved."""
    if "energy" not in notes[0]:
        return otherwise
    energy = torch.cat([n["energy"].cpu() for n in notes])[rows]
    *_, last = notes[0]["objective"]
    cost = torch.cat([n["objective"][last].cpu() for n in notes])[rows] * energy
    return float((cost.sum() / energy.sum()).sqrt())


def _moved(notes: list[dict], rows: slice, weight: torch.Tensor) -> float:
    """How far these rows were moved before they were rounded, relative to them: what `lowbit verify` allows for."""
    if "moved" not in notes[0]:
        return 0.0
    moved = torch.cat([n["moved"].cpu() for n in notes])[rows]
    return float(moved.norm() / weight.float().norm().clamp_min(1e-30))


def _output_errors(
    weight: torch.Tensor, qweight: QuantWeight, moments: Moments | None, ranks: Ranks
) -> dict[str, float | None]:
    """Relative output errors ||Q x - W x|| / ||W x|| in the quantized stream and ||Q x - W f|| / ||W f|| against the
    original one, on sampled tokens of all ranks."""
    if moments is None or not moments.tokens:
        return {"output_error": None, "output_error_to_original": None}
    x, f = (sample.cpu().float() for sample in moments.samples)
    dense, original = dequantize(qweight, torch.float32), weight.float()
    same_input, wanted = x @ original.T, f @ original.T
    error = x @ (dense - original).T  # no difference of nearly equal numbers
    parts = error, same_input, error + (same_input - wanted), wanted
    squares = torch.stack([part.square().sum(dtype=torch.float64) for part in parts])
    squares = squares.to(ranks.device)
    ranks.sum(squares)
    error, norm, error_to_original, norm_of_original = squares.sqrt().tolist()
    return {  # inputs that are always zero have no outputs to be wrong
        "output_error": error / max(norm, 1e-30),
        "output_error_to_original": error_to_original / max(norm_of_original, 1e-30),
    }
