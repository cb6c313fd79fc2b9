"""Which channels of a layer can be scaled in one place and back in another, without a change of what it computes.

SmoothQuant and AWQ scale the inputs of linears, x / s and W s, and fold 1 / s into whatever makes x: a norm, or the
linear before. Which module that is, and whether anything else hears of it, is found by trial on the loaded layer:

1. The outputs of a module are multiplied by powers of two, another one for each channel, and the inputs of all products
   of the layer are looked at. Powers of two round nothing: an input that passes the scales on is the old one times
   powers of two, exactly, and these spell which output of the module each of its channels is (heads that are repeated,
   say). Whatever is behind something that does not scale (a softmax, another norm, a sum with the residual stream) is
   changed otherwise, or not at all.
2. The weights of those products are divided by the same powers of two, and it is tried again: products behind those
   that are repaired now may be next (experts behind their router).
3. Finally the parameters of the module are scaled instead of its outputs; some norms multiply by 1 + weight. If the
   output of the layer is unchanged, up to rounding, no other consumer reads the scaled channels, and the pair is
   foldable. Activations are normalised to about 1 first: for large inputs GELU is indistinguishable from ReLU, which
   would accept scales that are wrong at normal magnitudes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.discovery.shared_inputs import Products

# A channel's number is spelled in digits of this base, one trial each: digit d multiplies it by 2^(d + 1)
_BASE = 8
# Relative difference of what is the same, and of outputs that are the same but for the rounding of a norm's 1 + weight
_EXACT, _ROUNDED = 1e-3, 1e-2


@dataclass(frozen=True)
class Edit:
    """A parameter, and the axis (from the end) along which it is scaled; `offset` + it is what multiplies."""

    parameter: str
    axis: int
    offset: float = 0.0

    def apply(self, tensor: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """`tensor` scaled by `scales` [size of the axis], in its own dtype."""
        shape = [1] * tensor.ndim
        shape[self.axis] = -1
        scales = scales.to(tensor.device).float().view(shape)
        return ((tensor.float() + self.offset) * scales - self.offset).to(tensor.dtype)

    def transposed(self) -> "Edit":
        """For a tensor that holds the matrices transposed."""
        return Edit(self.parameter, -3 - self.axis, self.offset)


@dataclass(frozen=True)
class Fold:
    """producers: scaled by 1 / s, for s [width], a scale of each channel. consumers: their input k is scaled by
    s[channels[k]], channels int64 [K]. The first producer is a weight, another one its bias."""

    producers: tuple[Edit, ...]
    consumers: tuple[Edit, ...]
    channels: torch.Tensor
    width: int


@dataclass(frozen=True)
class _Seen:
    """One forward pass: the products (parameter, input) in their order, and the output."""

    products: list[tuple[str, torch.Tensor]]
    output: torch.Tensor


class _Layer:
    """What can be tried on a loaded layer: `run()` is a forward pass through it, `module` it itself, and `in_axis` says
    along which axis a parameter takes its inputs."""

    def __init__(self, module: nn.Module, run: Callable[[], torch.Tensor], in_axis: Callable[[str], int]):
        self.module, self.run, self.in_axis = module, run, in_axis
        self.parameters = dict(module.named_parameters())
        self._weights = {name: p for name, p in self.parameters.items() if p.ndim in (2, 3)}

    def size_of(self, producer: nn.Module) -> torch.Tensor:
        """Root mean square [width] of what a module puts out."""
        sizes = []

        def measure(module, args, output):
            sizes.append(output.detach().flatten(0, -2).float().square().mean(0).sqrt())

        hook = producer.register_forward_hook(measure)
        self.see()
        hook.remove()
        return sizes[0]

    def see(self) -> _Seen:
        products = []
        with torch.no_grad(), Products(self._weights, lambda name, x: products.append((name, x.clone()))):
            output = self.run().clone()
        return _Seen(products, output)

    @contextmanager
    def edited(self, edits: list[tuple[Edit, torch.Tensor]]) -> Iterator[None]:
        """With parameters scaled in place; afterwards they are what they were, to the bit."""
        before = {edit.parameter: self.parameters[edit.parameter].detach().clone() for edit, _ in edits}
        try:
            for edit, scales in edits:
                data = self.parameters[edit.parameter].data
                data.copy_(edit.apply(data, scales))
            yield
        finally:
            for name, data in before.items():
                self.parameters[name].data.copy_(data)

    @contextmanager
    def scaled(self, producer: nn.Module, scales: torch.Tensor) -> Iterator[None]:
        """With the outputs of a module multiplied; those that are no tensor stay as they are."""

        def multiply(module, args, output):
            return output * scales.to(output) if isinstance(output, torch.Tensor) else output

        hook = producer.register_forward_hook(multiply)
        try:
            yield
        finally:
            hook.remove()


def find_folds(module: nn.Module, run: Callable[[], torch.Tensor], in_axis: Callable[[str], int]) -> list[Fold]:
    """The folds of a layer, in the order of its modules.

    module: the loaded layer; names in what is found are relative to it. run: a forward pass through it on some hidden
    states, returns [..., H]. in_axis: of a parameter with 2 or 3 dimensions, the axis of its inputs, -1 or -2.
    """
    layer, folds = _Layer(module, run, in_axis), []
    base = layer.see()
    for name, producer in module.named_modules():
        weight = dict(producer.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim not in (1, 2):
            continue
        found = _consumers(layer, base, producer, _width(layer, name, weight))
        if found and (fold := _realized(layer, base, name, producer, found)) is not None:
            folds.append(fold)
    return folds


def _width(layer: _Layer, name: str, weight: torch.Tensor) -> int:
    return len(weight) if weight.ndim == 1 else weight.shape[_out_axis(layer, name)]


def _out_axis(layer: _Layer, name: str) -> int:
    return -3 - layer.in_axis(f"{name}.weight")


def _consumers(layer: _Layer, base: _Seen, producer: nn.Module, width: int) -> dict[str, torch.Tensor]:
    """parameter -> channels [K] of all that take in what `producer` puts out as it is."""
    trials = [2.0 ** (torch.arange(width) // _BASE**digit % _BASE + 1) for digit in range(_digits(width))]
    found: dict[str, torch.Tensor] = {}
    while True:
        spelled: dict[int, list[torch.Tensor]] = {}
        for scales in trials:
            repaired = [(Edit(p, layer.in_axis(p)), 1 / scales[channels]) for p, channels in found.items()]
            with layer.edited(repaired), layer.scaled(producer, scales):
                seen = layer.see()
            for place, ((name, x), (same, before)) in enumerate(zip(seen.products, base.products, strict=False)):
                if name != same or x.shape != before.shape:
                    break  # tokens were sent to other experts
                if name not in found and (digits := _exponents(x, before)) is not None:
                    spelled.setdefault(place, []).append(digits - 1)
            if not spelled:
                return found
        new = _channels(base, {place: d for place, d in spelled.items() if len(d) == len(trials)}, width)
        if not new:
            return found
        found |= new  # what was disturbed behind them is not, the next time


def _digits(width: int) -> int:
    count = 1
    while _BASE**count < width:
        count += 1
    return count


def _exponents(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
    """int64 [K]: e with x = before * 2^e, channel by channel; None if it is nothing of that kind, or one of 0."""
    x, before = (t.detach().flatten(0, -2).float() for t in (x, before))
    if not len(before):
        return None
    largest = before.abs().argmax(0, keepdim=True)
    ratio = x.gather(0, largest) / before.gather(0, largest)
    silent = before.gather(0, largest)[0] == 0  # such a channel may be any
    exponents = torch.where(silent, 1.0, ratio[0].abs().log2().round())
    if not exponents.isfinite().all() or exponents.min() < 1 or exponents.max() > _BASE:
        return None
    if _distance(x, before * 2**exponents) > _EXACT:
        return None
    return torch.where(silent, 0, exponents).long()


def _channels(base: _Seen, spelled: dict[int, list[torch.Tensor]], width: int) -> dict[str, torch.Tensor]:
    """parameter -> channels, from digits (-1 where a channel is silent) at places of `base`."""
    found: dict[str, torch.Tensor] = {}
    for place, digits in spelled.items():
        channels = sum(digit * _BASE**number for number, digit in enumerate(digits))
        silent = digits[0] < 0
        if silent.any():  # those of an input that is as wide as the output are in its order
            if len(channels) != width:
                continue
            channels[silent] = torch.arange(width, device=channels.device)[silent]
        if channels.max() < width:
            found[base.products[place][0]] = channels.cpu()
    return found


def _realized(
    layer: _Layer, base: _Seen, name: str, producer: nn.Module, found: dict[str, torch.Tensor]
) -> Fold | None:
    """The fold with parameters of the producer in place of its outputs, if there is one that changes nothing."""
    channels = next(iter(found.values()))
    if any(not torch.equal(channels, other) for other in found.values()):
        return None
    prefix, own = f"{name}." if name else "", dict(producer.named_parameters(recurse=False))
    weight, bias = own["weight"], own.get("bias")
    consumers = tuple(Edit(parameter, layer.in_axis(parameter)) for parameter in found)
    axis, width = (-1 if weight.ndim == 1 else _out_axis(layer, name)), _width(layer, name, weight)
    usual = layer.size_of(producer).log2().round().nan_to_num(0, 0, 0)
    scales = 2.0 ** (usual + torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(0)).to(usual))
    for offset in (0.0, 1.0) if weight.ndim == 1 else (0.0,):
        producers = [Edit(f"{prefix}weight", axis, offset)]
        if bias is not None:
            producers.append(Edit(f"{prefix}bias", -1))
        fold = Fold(tuple(producers), consumers, channels, width)
        with layer.edited(planned_edits(fold, weight, scales)):
            if _distance(layer.see().output, base.output) < (_ROUNDED if offset else _EXACT):
                return fold
    return None


def planned_edits(fold: Fold, weight: torch.Tensor, scales: torch.Tensor) -> list[tuple[Edit, torch.Tensor]]:
    """Each edit of a fold with its scales, for s = `scales`, float32 [width]. weight: the producer's, as it is stored:
    the few numbers of a norm are rounded when they are scaled, and consumers are scaled by what they have become."""
    first, *others = fold.producers
    scales = scales.to(weight.device)
    reached = scales
    if weight.ndim == 1:
        before, after = weight.float() + first.offset, first.apply(weight, 1 / scales).float() + first.offset
        reached = torch.where(after * before > 0, before / after, scales)
    edits = [(first, 1 / scales), *((other, 1 / reached) for other in others)]
    return edits + [(edit, reached[fold.channels.to(scales.device)]) for edit in fold.consumers]


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return float(difference) if difference.isfinite() else torch.inf
