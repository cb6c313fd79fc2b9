"""Which layer a stored tensor is in, and which rows of which matrix: the way from checkpoint to model and back.

A linear is stored as one tensor. The experts of a layer are one 3-D parameter in memory, and in the file that
parameter, or a tensor for each expert, or two (gate and up) that lie one below the other in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.discovery import CheckpointNames
from lowbit.errors import InputError
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.plan import Plan, Step


def steps_by_layer(plan: Plan, model: LayeredModel) -> list[list[Step]]:
    """The steps that are quantized with data in each decoder layer; behind them the output embedding, if it is.

    Raises InputError for static activations outside of the layers.
    """
    layers: list[list[Step]] = [[] for _ in model.layers]
    head = []
    for step in plan.quantized:
        if step.site.kind == "experts" and not step.site.routed:
            continue  # nothing is known of how tokens get to these experts: they are quantized without data
        parameter, _ = model.names.locate(step.source.name)
        number = model.layer_of(parameter)
        if number is not None and number < len(layers):  # others predict further tokens: no pass reaches them
            layers[number].append(step)
        elif model.is_head(parameter):
            head.append(step)
        elif step.scheme.is_static:
            raise InputError(
                f"{step.base} lies outside of the decoder layers, where calibration does not see its inputs: leave "
                "it alone with --ignore, or give it a dynamic scheme with --override"
            )
    return layers + ([head] if head else [])


@dataclass(frozen=True)
class Target:
    """A matrix to quantize: `weight` [N, K] in its stored dtype, which is `rows` of `parameter` (of one expert)."""

    step: Step
    parameter: str
    expert: int | None
    rows: slice
    weight: torch.Tensor

    def view(self, model: nn.Module) -> torch.Tensor:
        """The [N, K] view of the parameter that holds this matrix."""
        return self.within(model.get_parameter(self.parameter).data)

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """The [N, K] view of this matrix in a tensor of the parameter's shape."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return (matrix.T if self.step.site.transposed else matrix)[self.rows]


def targets(
    steps: Iterable[Step], tensors: dict[str, torch.Tensor], names: CheckpointNames, model: nn.Module
) -> dict[str, list[Target]]:
    """parameter -> its targets in the order of experts and rows.

    Raises InputError if a tensor is not found in the loaded `model` where it is expected.
    """
    found: dict[str, list[Target]] = {}
    for step in steps:
        tensor = tensors[step.source.name]
        parameter, _ = names.locate(step.source.name)
        matrices = [(None, tensor)] if tensor.ndim == 2 else list(enumerate(tensor))
        part = 0
        if tensor.ndim == 2 and step.site.experts:
            expert, part = names.expert(step.source.name) or (0, 0)
            matrices = [(expert, tensor)]
        for expert, matrix in matrices:
            weight = matrix.T.contiguous() if step.transposed else matrix
            rows = slice(part * len(weight), (part + 1) * len(weight))
            found.setdefault(parameter, []).append(Target(step, parameter, expert, rows, weight))
    for target in (target for several in found.values() for target in several):
        loaded = target.view(model)
        if loaded.shape != target.weight.shape or not torch.equal(loaded.cpu(), target.weight.to(loaded.dtype)):
            raise InputError(
                f"{target.step.source.name} is changed while transformers loads it: leave it alone with --ignore"
            )
    for several in found.values():
        several.sort(key=lambda target: (-1 if target.expert is None else target.expert, target.rows.start))
    return found
