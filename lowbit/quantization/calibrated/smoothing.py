"""Smoothing the decoder layers of a calibrated run, one after the other.

What is scaled are the tensors of the checkpoint, before they are quantized; norms, biases and routers that are scaled
with them are stored like what is quantized. The report says what was scaled by how much (`recorded_edits`): a run that
goes on scales finished layers alike again, and `lowbit verify` the source.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lowbit.calibration.folds import Fold, find_folds
from lowbit.calibration.recorded import add_edits, scaled
from lowbit.calibration.smooth import Activations, Choice, Consumer, choose_scales, scales_of
from lowbit.discovery import find_sites
from lowbit.discovery.shared_inputs import Products
from lowbit.numerics.grid import dequantize, quantize_nearest
from lowbit.parallel.ranks import Ranks
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.streams import NoStreams, Streams
from lowbit.quantization.calibrated.targets import Target, targets
from lowbit.quantization.plan import Plan, Step
from lowbit.transformers_api import tied_weights

# The foldable pairs are searched for on so many tokens of the first sample
_TRIED_TOKENS = 64
# Each candidate is tried on at most so many of the experts' matrices
_MOST_MATRICES = 16


@dataclass(frozen=True)
class Smoothed:
    """tensors: of the layer, scaled where they are. changed: those that are not quantized. entries: of the report."""

    tensors: dict[str, torch.Tensor]
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: list[dict] = field(default_factory=list)


class Smoother:
    """Scales the layers of `model`, which has one loaded at a time, for `batches` int64 [B, T] of this rank."""

    def __init__(self, plan: Plan, model: LayeredModel, batches: list[torch.Tensor], ranks: Ranks):
        self.plan, self.model, self.batches, self.ranks = plan, model, batches, ranks

    def smooth(
        self, number: int, steps: list[Step], tensors: dict[str, torch.Tensor], streams: Streams | NoStreams
    ) -> Smoothed:
        """The loaded layer `number` of checkpoint `tensors`; `steps` are those that will be quantized with data."""
        todo = targets(steps, tensors, self.model.names, self.model.model)
        prefix = f"{self.model.prefix}.{number}."
        usable, entries = [], []
        for fold in self._folds(number, prefix, streams):
            consumers = [target for edit in fold.consumers for target in todo.get(prefix + edit.parameter, ())]
            reason = self._refusal(fold, prefix, tensors, todo)
            if reason or not consumers:
                entries.append({**_described(fold, prefix), "reason": reason or "nothing behind it is quantized"})
            else:
                usable.append((fold, consumers))
        seen = self._activations(number, prefix, [fold for fold, _ in usable], streams)
        stored, edits = {self.model.names.locate(name)[0]: tensor for name, tensor in tensors.items()}, {}
        for (fold, consumers), activations in zip(usable, seen, strict=True):
            choice = self._choice(fold, consumers, activations)
            entries.append(_entry(fold, prefix, choice))
            if choice.alpha is not None:
                add_edits(edits, fold, prefix, scales_of(choice.exponents), stored)
        made = {name: scaled(name, tensor, edits, self.model.names) for name, tensor in tensors.items()}
        quantized = {step.source.name for step in steps}
        changed = {name: made[name] for name in tensors if made[name] is not tensors[name] and name not in quantized}
        return Smoothed(made, changed, entries)

    def _folds(self, number: int, prefix: str, streams: Streams | NoStreams) -> list[Fold]:
        """Of each layer anew: a stopped run that goes on shall find the same."""
        axes = {name: -2 if site.transposed else -1 for name, site in find_sites(self.model.model).items()}

        def find() -> list[Fold]:
            hidden = streams.read(0)[0]
            few = None if hidden is None else hidden[:1, :_TRIED_TOKENS]
            return find_folds(
                self.model.layers[number],
                lambda: self.model.run(number, self.batches[0][:1, :_TRIED_TOKENS], few),
                lambda name: axes.get(prefix + name, -1),
            )

        return self.ranks.of_first(find)

    def _refusal(
        self, fold: Fold, prefix: str, tensors: Mapping[str, torch.Tensor], todo: Mapping[str, list[Target]]
    ) -> str | None:
        """Why a fold cannot be made in the checkpoint."""
        edits = {prefix + edit.parameter: edit for edit in (*fold.producers, *fold.consumers)}
        tied = tied_weights(self.model.model)
        if shared := edits.keys() & {*tied, *tied.values()}:
            return f"{min(shared)} is tied to another weight"
        stored = set()
        for name, tensor in tensors.items():
            parameter, direct = self.model.names.locate(name)
            if parameter not in edits:
                continue
            stored.add(parameter)
            whole = sorted(tensor.shape) == sorted(self.model.model.get_parameter(parameter).shape)
            if not direct or (edits[parameter] in fold.producers and not whole):
                return f"{name} is computed from while loading"
        missing = edits.keys() - stored
        if missing:
            return f"{min(missing)} is not stored as it is"
        without_data = {s.site.parameter for s in self.plan.quantized} & edits.keys() - todo.keys()
        return f"{min(without_data)} is quantized without data" if without_data else None

    def _activations(
        self, number: int, prefix: str, folds: list[Fold], streams: Streams | NoStreams
    ) -> list[Activations]:
        """Of the inputs that each fold scales, as the layer computes them now."""
        device, parameters = self.model.device, dict(self.model.layers[number].named_parameters())
        seen = [Activations(len(fold.channels), device) for fold in folds]
        # all consumers of a fold read the same input: it is observed at one, a router rather than experts
        first = [min(fold.consumers, key=lambda edit: parameters[edit.parameter].ndim).parameter for fold in folds]
        weights = {name: parameters[name] for name in first}
        tokens = sum(batch.numel() for batch in self.batches)

        def add(name: str, x: torch.Tensor) -> None:
            for place, listened in enumerate(first):
                if listened == name:
                    seen[place].add(x.flatten(0, -2), tokens)

        for index, batch in enumerate(self.batches):
            with torch.no_grad(), Products(weights, add):
                self.model.run(number, batch, streams.read(index)[0])
        parts = self.ranks.all_of(seen)
        return [Activations.merged(of_ranks) for of_ranks in zip(*parts, strict=True)]

    def _choice(self, fold: Fold, consumers: list[Target], activations: Activations) -> Choice:
        if not activations.tokens:
            return Choice(torch.zeros(fold.width, dtype=torch.long), None, (0.0, 0.0))
        consumers = consumers[:: -(-len(consumers) // _MOST_MATRICES)]
        device = self.model.device
        each = [Consumer(target.weight.to(device), _rounded(target)) for target in consumers]
        inputs = consumers[0].step.scheme.activations
        bits = None if inputs is None else inputs.bits
        return choose_scales(each, activations, fold.channels, fold.width, self.plan.recipe.smooth, bits)


def _rounded(target: Target) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounding to nearest stands for the quantizer of the run, which may take a thousand times as long."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return dequantize(
            quantize_nearest(weight.to(target.weight.dtype), target.step.scheme.weight_only), torch.float32
        )

    return rounded


def _described(fold: Fold, prefix: str) -> dict:
    return {
        "producer": prefix + fold.producers[0].parameter,
        "consumers": [prefix + edit.parameter for edit in fold.consumers],
    }


def _entry(fold: Fold, prefix: str, choice: Choice) -> dict:
    """What the report says of a fold, and what it takes to make it again: channels as runs [first, length], exponents
    (`calibration.smooth.scales_of`) as bytes, signed, in base 64."""
    entry = {
        **_described(fold, prefix),
        "alpha": choice.alpha,
        "output_error_before": choice.errors[0],
        "output_error": choice.errors[1],
    }
    if choice.alpha is None:
        return entry
    return entry | {
        "producer_edits": [[edit.parameter, edit.axis, edit.offset] for edit in fold.producers],
        "consumer_edits": [[edit.parameter, edit.axis] for edit in fold.consumers],
        "prefix": prefix,
        "channels": _runs(fold.channels.tolist()),
        "exponents": b64encode(choice.exponents.to("cpu", torch.int8).numpy().tobytes()).decode("ascii"),
    }


def _runs(channels: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([channel, 1])
    return runs
