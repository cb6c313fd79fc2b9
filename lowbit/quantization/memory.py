"""How much memory a calibrated run takes: measured, and predicted from shapes before it begins.

Beside what the process holds at its beginning, a layer as each model has it and its stored form, a run holds

- the forward passes that wait between the stages of the layer;
- while inputs are measured, their moments, and what the heaps of the passes' threads keep of memory that was freed;
- while a weight is quantized, the solver's matrices; freed memory was given back before.
"""

from collections import defaultdict
from dataclasses import dataclass

from lowbit.quantization.plan import Step
from lowbit.system.memory import available_memory, kept_by_heaps, peak_memory

# float32 matrices the size of the weights that a solver quantizes together, and of their Hessian: when it corrects its
# target, and when it factors (the Hessian, a float64 copy, the factor)
_WEIGHTS_TO_CORRECT, _HESSIANS_TO_CORRECT = 5, 2
_WEIGHTS_TO_FACTOR, _HESSIANS_TO_FACTOR = 1, 4
# A pass that waits at the widest linear of a layer: its input and the product before it; and what the layer was given,
# the residual stream, and a normed copy of it
_WIDEST_HELD, _HIDDEN_HELD = 2, 3


@dataclass(frozen=True)
class Shapes:
    """What memory depends on.

    steps: what is quantized in each layer. streams: how many models go through them. itemsize: of the dtype that they
    compute in. hidden_size: of the hidden states. batches: tokens of each batch. hessians: whether the solver has them.
    """

    steps: list[list[Step]]
    streams: int
    itemsize: int
    hidden_size: int
    batches: list[int]
    hessians: bool

    @property
    def widest(self) -> int:
        """Inputs of the widest linear."""
        return max((step.site.in_features for group in self.steps for step in group), default=0)


def solver_peak(out_features: int, in_features: int, hessians: bool) -> int:
    """Bytes that a solver holds at a time for weights of one input, beside the weights themselves."""
    weights, squares = out_features * in_features, in_features**2 * hessians
    correcting = _WEIGHTS_TO_CORRECT * weights + _HESSIANS_TO_CORRECT * squares
    factoring = _WEIGHTS_TO_FACTOR * weights + _HESSIANS_TO_FACTOR * squares
    return 4 * max(correcting, factoring)


def moments_bytes(out_features: int, in_features: int, hessians: bool) -> int:
    """Bytes of the second moments of one input: the Hessian, and what its linears lack or its own drift."""
    return 4 * in_features * (in_features * hessians + min(out_features, in_features))


def pass_bytes(shapes: Shapes, tokens: int) -> int:
    """Bytes that the forward passes of all streams over so many tokens hold while they wait at the widest linear."""
    held = _WIDEST_HELD * shapes.widest + _HIDDEN_HELD * shapes.hidden_size
    return shapes.streams * tokens * held * shapes.itemsize


def _together(group: list[Step]) -> list[tuple[int, int]]:
    """(outputs, inputs) of linears of a layer that probably multiply one input: those of one module, equally wide."""
    found: dict[tuple[str, int], int] = defaultdict(int)
    for step in group:
        site = step.site
        if site.kind == "experts" or site.experts:
            found[step.base, site.in_features] = site.out_features
        else:
            found[site.module.rpartition(".")[0], site.in_features] += site.out_features
    return [(outputs, inputs) for (_, inputs), outputs in found.items()]


def expected_peak(shapes: Shapes, keep: bool) -> int:
    """Bytes that a run takes at most, with what is held now. keep: whether passes stay open between stages."""
    open_tokens = sum(shapes.batches) if keep else max(shapes.batches, default=0)
    passes = shapes.streams * (len(shapes.batches) if keep else 1)
    largest = max(shapes.batches, default=0) * shapes.widest * shapes.itemsize
    measuring = kept_by_heaps(passes, largest)

    def layer(group: list[Step]) -> int:
        weights = sum(step.source.numel for step in group)
        of_inputs = [
            max(moments_bytes(*sizes, shapes.hessians) + measuring, solver_peak(*sizes, shapes.hessians))
            for sizes in _together(group)
        ]
        return (shapes.streams * shapes.itemsize + 2) * weights + max(of_inputs, default=measuring)

    layers = max(map(layer, shapes.steps), default=0)
    return peak_memory() + layers + pass_bytes(shapes, open_tokens)


@dataclass(frozen=True)
class ExpectedMemory:
    """peak: bytes that a run will take. keep: whether forward passes can stay open between the stages of a layer."""

    peak: int
    keep: bool


def expected_memory(shapes: Shapes, allowed: int | None) -> ExpectedMemory:
    """What a run will take, and how it keeps to what it may.

    allowed: bytes; None: half of what is free besides what is held now.
    """
    peak = expected_peak(shapes, keep=True)
    keep = peak <= (allowed or peak_memory() + available_memory() // 2)
    return ExpectedMemory(peak if keep else expected_peak(shapes, keep=False), keep)
