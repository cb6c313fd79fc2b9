"""How much to scale: SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) and AWQ (Lin et al. 2023, arXiv:2306.00978).

Both divide the inputs x of linears by s and multiply their weights W with it, channel by channel,

    s_k = a_k^alpha / b_k^(1 - alpha),      a_k: size of x_k over tokens,      b_k: largest |W_nk| over outputs n

SmoothQuant so that what is too large for the grid of the activations moves into the weights (a: the largest), AWQ so
that the inputs that matter get a finer grid (a: the mean; its first version has no b). alpha is searched: the one whose
quantized weights, and inputs where they are rounded too, change the outputs least, on tokens of the calibration set.

Scales are powers of 2^(1/8), which a report holds in a byte and every machine computes alike. (Whole powers of two
would be folded into other parameters without rounding, but leave less of the gain: on the embedded model at W4A16-G128
the error of the outputs of q, k and v shrinks to 0.954 of what it was with any scales, 0.975 with powers of 2^(1/2),
1.000 with powers of two.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

# A scale is 2^(exponent / 8), from 2^-8 to 2^8: 16-bit weights take that without an overflow
_STEPS, _LARGEST_EXPONENT = 8, 64
_ROOTS = tuple(2 ** (step / _STEPS) for step in range(_STEPS))
# Tokens and rows of weights that candidates are judged by
_TOKENS, _ROWS = 512, 512
_ALPHAS = tuple(step / 20 for step in range(21))
AUTO = "auto"

# A weight [N, K] -> what its quantized form stands for
Rounded = Callable[[torch.Tensor], torch.Tensor]


class Activations:
    """Of the inputs [tokens, K] of some linears: `mean` and `largest` of their absolute values, float32 [K], and
    `sample` [at most 512, K]."""

    def __init__(self, in_features: int, device="cpu"):
        self.tokens, self._sum = 0, torch.zeros(in_features, dtype=torch.float64, device=device)
        self.largest = torch.zeros(in_features, device=device)
        self._sampled: list[torch.Tensor] = []
        self._random = torch.Generator().manual_seed(0)

    def add(self, x: torch.Tensor, expected: int) -> None:
        """x: floating [tokens, K]. expected: how many tokens will be added in all."""
        if not len(x):
            return
        size = x.float().abs()
        self.tokens += len(x)
        self._sum += size.sum(0)
        self.largest = torch.maximum(self.largest, size.amax(0))
        rows = torch.randperm(len(x), generator=self._random)[: -(-_TOKENS * len(x) // expected)]
        self._sampled.append(x[rows.to(x.device)].float())

    @classmethod
    def merged(cls, parts: Iterable["Activations"]) -> "Activations":
        """Those of several processes."""
        first, *others = parts
        for part in others:
            first.tokens += part.tokens
            first._sum += part._sum.to(first._sum.device)
            first.largest = torch.maximum(first.largest, part.largest.to(first.largest.device))
            first._sampled += [sample.to(first.largest.device) for sample in part._sampled]
        return first

    @property
    def mean(self) -> torch.Tensor:
        return (self._sum / max(self.tokens, 1)).float()

    @property
    def sample(self) -> torch.Tensor:
        whole = torch.cat(self._sampled)
        return whole[:: -(-len(whole) // _TOKENS)]


@dataclass(frozen=True)
class Consumer:
    """weight: floating [N, K]. rounded: what quantizing makes of such a matrix."""

    weight: torch.Tensor
    rounded: Rounded


@dataclass(frozen=True)
class Choice:
    """exponents: int64 [width], of 2^(1/8). alpha: None if nothing is scaled. errors: relative output error of the
    quantized consumers without scales, and with them."""

    exponents: torch.Tensor
    alpha: float | None
    errors: tuple[float, float]


def scales_of(exponents: torch.Tensor) -> torch.Tensor:
    """int64 [width] -> float32: the same on every machine, for nothing but products with powers of two is rounded."""
    roots = torch.tensor(_ROOTS, dtype=torch.float32, device=exponents.device)
    return torch.ldexp(roots[exponents % _STEPS], exponents // _STEPS)


def choose_scales(
    consumers: list[Consumer], activations: Activations, channels: torch.Tensor, width: int, alpha: float | str,
    activation_bits: int | None = None,
) -> Choice:  # fmt: skip
    """Exponents for the `width` outputs of a module, of which input k of the consumers is channels[k].

    alpha: of SmoothQuant, or "auto": the best of many, and none if none is better. activation_bits: of inputs that are
    rounded too, token by token.
    """
    samples = [_sampled(consumer) for consumer in consumers]
    x, channels = activations.sample, channels.to(activations.largest.device)
    by_weight = _gathered(torch.stack([c.weight.float().abs().amax(0) for c in consumers]).amax(0), channels, width)
    wanted = [x @ consumer.weight.T for consumer in samples]

    def error(exponents: torch.Tensor) -> float:
        return _error(samples, x, wanted, scales_of(exponents)[channels], activation_bits)

    none = torch.zeros(width, dtype=torch.long, device=x.device)
    before = error(none)
    rounds_inputs = activation_bits is not None
    size = _gathered(activations.largest if rounds_inputs or alpha != AUTO else activations.mean, channels, width)
    if alpha != AUTO:
        exponents = _exponents(size, by_weight, alpha, 1 - alpha)
        return Choice(exponents, alpha, (before, error(exponents)))
    best = Choice(none, None, (before, before))
    for candidate in _ALPHAS:
        for beta in {1 - candidate, 0.0} if not rounds_inputs else {1 - candidate}:
            exponents = _exponents(size, by_weight, candidate, beta)
            found = error(exponents)
            if found < best.errors[1]:
                best = Choice(exponents, candidate, (before, found))
    return best


def _sampled(consumer: Consumer) -> Consumer:
    step = -(-len(consumer.weight) // _ROWS)
    return Consumer(consumer.weight[::step].float(), consumer.rounded)


def _gathered(values: torch.Tensor, channels: torch.Tensor, width: int) -> torch.Tensor:
    """[K] -> [width]: the largest of those that share a channel."""
    return torch.zeros(width, device=values.device).scatter_reduce_(0, channels, values, "amax")


def _exponents(size: torch.Tensor, by_weight: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Of size^alpha / by_weight^beta around 1; 0 for what is always zero."""
    exponents = _STEPS * (alpha * size.log2() - beta * by_weight.log2())
    alive = exponents.isfinite()
    exponents = torch.where(alive, exponents - exponents[alive].mean(), 0.0)
    return exponents.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).long()


def _error(
    consumers: list[Consumer], x: torch.Tensor, wanted: list[torch.Tensor], scales: torch.Tensor, bits: int | None
) -> float:
    """||Q(W s) (x / s) - W x|| / ||W x||, over all consumers; with rounded inputs if there are bits."""
    smooth = x / scales
    if bits is not None:
        step = smooth.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
        smooth = (smooth / step).round() * step
    lost = norm = 0.0
    for consumer, output in zip(consumers, wanted, strict=True):
        made = smooth @ consumer.rounded(consumer.weight * scales).T
        lost += float((made - output).square().sum())
        norm += float(output.square().sum())
    return (lost / max(norm, 1e-30)) ** 0.5
