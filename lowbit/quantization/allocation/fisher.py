"""What quantizing a weight costs in KL, to second order, from one backward pass through the model.

Let p be the next-token distribution of the model, and let a linear's output y at a token change by d. To second order

    KL(p || p') = 1/2 d^T J^T F J d,        F = diag(p) - p p^T, the Fisher information of the logits,

with J the derivative of the logits with respect to y. F = E[z z^T] for z = sqrt(p) * e - p (sqrt(p) . e) and random
signs e, so that with g = J^T z, which one backward pass gives for every linear and token at once,

    KL = 1/2 E[(g . d)^2].

Signs of different tokens are independent: g at a token gathers what all later tokens see of it. The sum over tokens of
(g . d)^2 / 2 leaves out what the errors of two tokens have in common. d = (Q - W) x is computed for each scheme as it
is, so that nothing is assumed about the errors of weights. (Cf. K-FAC, arXiv:1503.05671; YAQA, arXiv:2505.22988.)

One layer is in memory at a time: forward, keeping the hidden states in front of each layer in files, then backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lowbit.discovery.shared_inputs import Product, Products
from lowbit.guards.safe_files import remove, write_whole
from lowbit.numerics.grid import dequantize
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme
from lowbit.quantization.allocation.layers import loaded
from lowbit.quantization.calibrated.model import LayeredModel
from lowbit.quantization.calibrated.targets import Target
from lowbit.quantization.plan import Step

# (weight [N, K], scheme) -> the weight quantized without data
Rounding = Callable[[torch.Tensor, Scheme], QuantWeight]
# Module -> scheme -> nats per token
Costs = dict[str, dict[Scheme, float]]


@dataclass(frozen=True)
class _Pulled:
    """A product of x, and g, the gradient of its result. transposed: the result is x W, not x W^T."""

    product: Product
    transposed: bool
    gradient: torch.Tensor

    def squares(self, change: torch.Tensor, parameter: torch.Tensor) -> float:
        """The sum over tokens of (g . d)^2, d what the result changes by if `change` is added to the parameter."""
        weight = self.product.weight
        start = weight.storage_offset() - parameter.storage_offset()
        part = change.as_strided(weight.shape, weight.stride(), start)
        d = self.product.x @ (part if self.transposed else part.T)
        return float((d * self.gradient).sum(-1, dtype=torch.float32).square().sum(dtype=torch.float64))


class _Recorder(Products):
    """Keeps the products of a forward pass with gradients: each, whether it is transposed, and its result."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        super().__init__(weights, lambda name, x: None)
        self.products: list[tuple[Product, bool, torch.Tensor]] = []

    def called(self, function: Callable, args: tuple, result: Any, product: Product | None) -> None:
        if product is not None:
            kept = replace(product, x=product.x.detach(), weight=product.weight.detach())
            self.products.append((kept, function is not torch.nn.functional.linear, result))


def second_order_costs(
    model: LayeredModel,
    steps: list[list[Step]],
    batches: Sequence[torch.Tensor],
    schemes: Mapping[str, Sequence[Scheme]],
    rounding: Rounding,
    folder: Path,
    advance: Callable[[str], None] = lambda what: None,
) -> Costs:
    """The KL that each weight costs in each scheme, all others left as they are.

    Args:
        model: The model, no layer loaded.
        steps: What is quantized in each decoder layer, and perhaps in the head behind them (`steps_by_layer`).
        batches: Token ids [B, T].
        schemes: Of each module, those to look at.
        rounding: How a weight is quantized.
        folder: For hidden states between layers; it is left as it was found.
        advance: Told of each layer that is done.

    Returns:
        Nats per token, for every module of `steps` and its schemes.
    """
    tokens = sum(batch.numel() for batch in batches)
    layers = len(model.layers)
    states = _States(folder)
    hidden: list[torch.Tensor | None] = [None] * len(batches)
    with torch.no_grad():
        for number in range(layers):
            with loaded(model, number, []):
                hidden = [model.run(number, ids, h) for ids, h in zip(batches, hidden, strict=True)]
            states.write(number + 1, hidden)
            advance(f"layer {number + 1}/{layers} forward")
    generator = torch.Generator(model.device).manual_seed(0)
    costs: Costs = {}
    gradients: list[torch.Tensor] | None = None
    for number in range(layers, -1, -1):
        here = steps[number] if number < len(steps) else []
        with loaded(model, number, here) as targets:
            parts = []
            inputs = states.read(number) if number else [None] * len(batches)
            for index, (ids, h) in enumerate(zip(batches, inputs, strict=True)):
                above = None if gradients is None else gradients[index]
                parts.append(_backward(model, number, ids, h, above, list(targets), generator))
            gradients = [below for below, _ in parts]
            pulled = [each for _, several in parts for each in several]
            for module, cost in _costs(model, targets, pulled, schemes, rounding):
                costs[module] = {scheme: value / tokens for scheme, value in cost.items()}
        states.drop(number)
        advance(f"layer {number + 1}/{layers} backward" if number < layers else "head backward")
    return costs


def _backward(
    model: LayeredModel,
    number: int,
    ids: torch.Tensor,
    hidden: torch.Tensor | None,
    above: torch.Tensor | None,
    names: list[str],
    generator: torch.Generator,
) -> tuple[torch.Tensor | None, list[_Pulled]]:
    """Run layer `number` for one batch and go back through it.

    Args:
        hidden: Its input [B, T, H], None in front of the first layer.
        above: Gradient of its output, None for the head, whose gradient is drawn.
        names: Parameters whose products are wanted.

    Returns:
        The gradient of the input, None in front of the first layer; and the products.
    """
    parameters = {name: model.model.get_parameter(name) for name in names}
    if hidden is not None:
        hidden = hidden.detach().requires_grad_(True)
    for parameter in parameters.values():
        parameter.requires_grad_(hidden is None)  # something has to, in front of the first layer
    with torch.enable_grad(), _Recorder(parameters) as recorder:
        output = model.run(number, ids, hidden)
        above = _drawn(output.detach(), generator) if above is None else above
        results = [result for *_, result in recorder.products]
        wanted = results if hidden is None else [hidden, *results]
        found = torch.autograd.grad(output, wanted, above, allow_unused=True) if wanted else []
    below, found = (None, found) if hidden is None else (found[0], found[1:])
    pairs = zip(recorder.products, found, strict=True)
    return below, [_Pulled(product, transposed, g) for (product, transposed, _), g in pairs if g is not None]


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """z of each token, like `logits` [B, T, V]: mean zero, covariance diag(p) - p p^T."""
    p = torch.softmax(logits.float(), -1)
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8).mul_(2).sub_(1)
    root = p.sqrt().mul_(signs)
    return root.sub_(p * root.sum(-1, keepdim=True)).to(logits.dtype)


def _costs(
    model: LayeredModel,
    targets: dict[str, list[Target]],
    pulled: list[_Pulled],
    schemes: Mapping[str, Sequence[Scheme]],
    rounding: Rounding,
) -> Iterator[tuple[str, dict[Scheme, float]]]:
    """(module, scheme -> half the sum over tokens of (g . d)^2) for each parameter, of which experts have one."""
    for name, several in targets.items():
        parameter = model.model.get_parameter(name).data
        mine = [each for each in pulled if each.product.name == name]
        module = several[0].step.site.module
        found: dict[Scheme, float] = {}
        for scheme in schemes.get(module, ()):
            change = torch.zeros_like(parameter)
            for target in several:
                rounded = dequantize(rounding(target.weight, scheme), torch.float32)
                target.within(change).copy_(rounded - target.weight.float())
            found[scheme] = sum(each.squares(change, parameter) for each in mine) / 2
        yield module, found


class _States:
    """Hidden states in front of layers, in files."""

    def __init__(self, folder: Path):
        self._folder = folder

    def _file(self, number: int) -> Path:
        return self._folder / f"hidden-{number}.safetensors"

    def write(self, number: int, hidden: list[torch.Tensor]) -> None:
        tensors = {str(index): tensor.contiguous().cpu() for index, tensor in enumerate(hidden)}
        write_whole(self._file(number), save(tensors))

    def read(self, number: int) -> list[torch.Tensor]:
        found = load_file(self._file(number))
        return [found[str(index)] for index in range(len(found))]

    def drop(self, number: int) -> None:
        remove(self._file(number))
