"""The real KL of allocations: the model and each of them go through the layers side by side, one layer in memory.

Each weight is quantized from what the layers of the original model give it, not from what is quantized in front of it:
so it is quantized once for each scheme, however many allocations have it. A calibrated run makes up for earlier errors
besides, which is not in these figures: `trial` measures it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lowbit.calibration.moments import Moments
from lowbit.discovery.shared_inputs import Product, Products
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.quantization.allocation.layers import loaded
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.targets import Target
from lowbit.quantization.plan import Step
from lowbit.quantizers import get_quantizer

# Module -> scheme; modules that are not in it stay as they are
Schemes = Mapping[str, Scheme]


@dataclass(frozen=True)
class Method:
    """How a recipe quantizes a weight, from the Hessian of its inputs where it wants one."""

    recipe: Recipe

    @property
    def wants_hessian(self) -> bool:
        return "hessian" in get_quantizer(self.recipe.method).needs(self.recipe.options)

    def without_data(self, weight: torch.Tensor, scheme: Scheme) -> QuantWeight:
        """Quantize as the method does; as the best rounding does, where the method wants data."""
        return self(weight, scheme, None)

    def __call__(self, weight: torch.Tensor, scheme: Scheme, hessian: torch.Tensor | None) -> QuantWeight:
        """Quantize a weight [N, K]. hessian: [K, K], None where no input is known."""
        if not self.wants_hessian:
            return get_quantizer(self.recipe.method).quantize(weight, {}, scheme, self.recipe.options)[0]
        if hessian is None:
            return get_quantizer("rtn").quantize(weight, {}, scheme, {"scale_search": "mse"})[0]
        stats = {"hessian": hessian, "missing": None}
        return get_quantizer(self.recipe.method).quantize(weight, stats, scheme, self.recipe.options)[0]


class _Inputs(Products):
    """Sums the second moments of what each matrix is multiplied with: (parameter, expert) -> Moments."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        super().__init__(weights, lambda name, x: None)
        self._parameters = weights
        self.moments: dict[tuple[str, int], Moments] = {}

    def called(self, function: Callable, args: tuple, result: torch.Tensor, product: Product | None) -> None:
        if product is None:
            return
        parameter = self._parameters[product.name]
        start = product.weight.storage_offset() - parameter.storage_offset()
        key = product.name, start // parameter.stride(0) if parameter.ndim == 3 else 0
        if key not in self.moments:
            self.moments[key] = Moments(product.x.shape[-1], product.x.device, ("hessian",))
        self.moments[key].add(product.x.flatten(0, -2))


def divergences(
    model: LayeredModel,
    steps: list[list[Step]],
    calibration: Sequence[torch.Tensor],
    batches: Sequence[torch.Tensor],
    allocations: Sequence[Schemes],
    method: Method,
    advance: Callable[[str], None] = lambda what: None,
) -> list[tuple[float, float]]:
    """The mean KL(model || allocation) of each allocation, in nats per token, and its standard error over batches (0 of
    one batch).

    Args:
        model: The model, no layer loaded.
        steps: What may be quantized in each decoder layer, and perhaps in the head behind them (`steps_by_layer`).
        calibration: Token ids [B, T] that the method calibrates with, where it wants data.
        batches: Others, that are judged on: what is calibrated with looks better than it is.
        allocations: What is quantized to what.
        method: How.
        advance: Told of each layer that is done.
    """
    layers = len(model.layers)
    learning: list[torch.Tensor | None] = [None] * len(calibration)
    streams: list[list[torch.Tensor | None]] = [[None] * len(batches) for _ in range(1 + len(allocations))]
    with torch.no_grad():
        for number in range(layers):
            with loaded(model, number, steps[number] if number < len(steps) else []) as targets:
                hessians = {}
                if method.wants_hessian:
                    learning, hessians = _observed(model, number, calibration, learning, list(targets))
                made: dict = {}
                for index, schemes in enumerate([{}, *allocations]):
                    _replace(model, targets, schemes, hessians, method, made)
                    pairs = zip(batches, streams[index], strict=True)
                    streams[index] = [model.run(number, ids, hidden) for ids, hidden in pairs]
            advance(f"layer {number + 1}/{layers}")
        head = steps[layers] if layers < len(steps) else []
        with loaded(model, layers, head) as targets:
            hessians = {}
            if targets and method.wants_hessian:
                _, hessians = _observed(model, layers, calibration, learning, list(targets))
            return _at_head(model, batches, streams, targets, allocations, method, hessians)


def _observed(
    model: LayeredModel, number: int, batches, hidden, names: list[str]
) -> tuple[list[torch.Tensor], dict[tuple[str, int], torch.Tensor]]:
    """What the layer makes of each batch, and the Hessians of the inputs of its parameters `names`."""
    with _Inputs({name: model.model.get_parameter(name) for name in names}) as inputs:
        out = [model.run(number, ids, h) for ids, h in zip(batches, hidden, strict=True)]
    for moments in inputs.moments.values():
        moments.finish()
    return out, {key: moments.hessian for key, moments in inputs.moments.items()}


def _replace(
    model: LayeredModel, targets: dict[str, list[Target]], schemes: Schemes, hessians: dict, method: Method, made: dict
) -> None:
    """Put the weights of an allocation in place. made: (matrix, scheme) -> the weight, kept for other allocations."""
    for target in (target for several in targets.values() for target in several):
        scheme = schemes.get(target.step.site.module)
        if scheme is None:
            target.view(model.model).copy_(target.weight)
            continue
        key = target.parameter, target.expert, target.rows.start, scheme
        if key not in made:
            hessian = hessians.get((target.parameter, target.expert or 0))
            weight = target.weight.to(model.device)
            made[key] = dequantize(method(weight, scheme, hessian), torch.float32).to(model.dtype)
        target.view(model.model).copy_(made[key])


def _at_head(
    model: LayeredModel,
    batches: Sequence[torch.Tensor],
    streams: list[list],
    targets: dict[str, list[Target]],
    allocations: Sequence[Schemes],
    method: Method,
    hessians: dict,
) -> list[tuple[float, float]]:
    """The divergences, from the hidden states behind the last layer."""
    layers, made = len(model.layers), {}
    found: list[list[float]] = [[] for _ in allocations]
    for batch, ids in enumerate(batches):
        if targets:
            _replace(model, targets, {}, hessians, method, made)
        wanted = model.run(layers, ids, streams[0][batch])
        for index, schemes in enumerate(allocations):
            if targets:
                _replace(model, targets, schemes, hessians, method, made)
            got = model.run(layers, ids, streams[index + 1][batch])
            found[index].append(divergence(wanted, got) / ids.numel())
    return [mean_and_error(each, batches) for each in found]


def divergence(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """KL(wanted || got) of logits [B, T, V], the sum over tokens."""
    p, q = (torch.log_softmax(logits.float(), -1) for logits in (wanted, got))
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def mean_and_error(found: Sequence[float], batches: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The mean over tokens of what was found in each batch, and its standard error."""
    values = torch.tensor(found, dtype=torch.float64)
    weights = torch.tensor([ids.numel() for ids in batches], dtype=torch.float64)
    mean = float((values * weights).sum() / weights.sum())
    return mean, 0.0 if len(values) < 2 else float(values.std()) / len(values) ** 0.5
