"""The grid of activations: from what a linear receives to int8 codes and back.

What a quantizer of activations has to decide, and where that is decided here:

    level    how many codes there are              `Activations.bits`: -128 ... 127
    scheme   whether the codes lie around zero     `Activations.sym`; else a zero point shifts them to the values
    range    which values the codes have to span   `token_range`, of each token alone; or a `RangeObserver`, of all that
                                                   a calibration shows: min-max, percentile or MSE
    mapping  value <-> code, affine                `affine`, `quantize`, `dequantize`

    x ~ (code - zero) * scale,    code = clamp(round(x / scale) + zero)

All in float32; a scale that is stored is rounded to its dtype before the zero point is chosen. Halves are rounded to
even. 2^8 codes around zero reach from -127.5 to 127.5 steps, which is the scale that compressed-tensors takes too; the
largest value is rounded to the last code.
"""

import math

import torch

from lowbit.numerics.scheme import Activations

# The percentile range ignores at most this share of the values, half of it at either end
_OUTLIERS = 1e-4
# The histogram of an observer; a range is found to within one bin of it
_BINS = 2048
# Parts of the histogram's ends that the search for the least squared error tries to do without
_SHRINK_STEPS = 100
# No scale is smaller: a token of zeros has it, and its codes are zeros
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# A histogram is no narrower than this: smaller values are all alike
_SMALLEST_WIDTH = 1e-30


def limits(activations: Activations) -> tuple[int, int]:
    """The first and the last code."""
    return -(2 ** (activations.bits - 1)), 2 ** (activations.bits - 1) - 1


def affine(
    low: torch.Tensor, high: torch.Tensor, activations: Activations, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale in dtype, zero int8 or None) of the grid that spans [low, high] and has a code for 0; shaped like low."""
    first, last = limits(activations)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if activations.sym:
        scale = torch.maximum(-low, high) / ((last - first) / 2)
    else:
        scale = (high - low) / (last - first)
    info = torch.finfo(dtype)
    scale = scale.clamp(min=max(_SMALLEST_SCALE, info.tiny * info.eps)).to(dtype)
    if activations.sym:
        return scale, None
    return scale, (first - low / scale.float()).round().clamp(first, last).to(torch.int8)


def token_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lowest, highest) value of each token, x [..., K] -> [..., 1]."""
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, activations: Activations) -> torch.Tensor:
    """The codes of x as int8; scale and zero broadcast against x."""
    codes = x.float().div(scale).round_()
    if zero is not None:
        codes.add_(zero)
    return codes.clamp_(*limits(activations)).to(torch.int8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The float32 values that codes stand for."""
    steps = codes.float()
    return (steps if zero is None else steps - zero) * scale


def quantize_input(
    x: torch.Tensor, activations: Activations, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes int8 [..., K], scale float32 [..., 1], zero int8 broadcastable to it, or None) of what a linear receives.

    scale, zero: those stored of a static grid, [1]. A token that holds NaN gets the scale NaN, whatever its codes are.
    """
    x = x.float()
    low, high = token_range(x)
    if activations.static:
        assert scale is not None, "a static grid has a stored scale"
        scale = torch.where(low.isnan(), low, scale.float())
    else:
        scale, zero = affine(low, high, activations)
    return quantize(x, scale, zero, activations), scale, zero


class RangeObserver:
    """What a calibration shows of the values of one input, in the memory of a histogram: `add` batches, `merge` what
    others have seen, then ask for the grid.

    The histogram covers [-width, width), a power of two that doubles for values outside, by adding up pairs of bins: no
    count is ever split, so batches in any order give the same.
    """

    def __init__(self):
        self.low, self.high = torch.inf, -torch.inf
        self._width = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        return self.low > self.high

    def add(self, x: torch.Tensor) -> None:
        """x: floating, of any shape. Raises ValueError for NaN and infinity."""
        if not x.numel():
            return
        x = x.detach().float()
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"values from {low} to {high}, expected finite ones")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(2.0 ** math.frexp(max(-low, high, _SMALLEST_WIDTH))[1])  # the power of two above it
        half = _BINS // 2
        # scaled by a power of two, which is exact: histc would round values into neighbouring bins
        self._counts += torch.histc((x * (half / self._width)).floor_(), _BINS, -half, half).cpu().double()

    def merge(self, other: "RangeObserver") -> None:
        if other.is_empty:
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._widen(other._width)
        counts, width = other._counts, other._width
        while width < self._width:
            counts, width = _paired(counts), 2 * width
        self._counts += counts

    def _widen(self, width: float) -> None:
        self._width = self._width or width
        while self._width < width:
            self._counts, self._width = _paired(self._counts), 2 * self._width

    def grid(
        self, method: str, activations: Activations, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scale [1] in dtype, zero int8 [1] or None) of the range that `method`, one of ACTIVATION_RANGES, finds."""
        low, high = {"minmax": self._minmax, "percentile": self._percentile, "mse": self._mse}[method](activations)
        return affine(torch.tensor([low]), torch.tensor([high]), activations, dtype)

    def _minmax(self, activations: Activations) -> tuple[float, float]:
        return self.low, self.high

    def _percentile(self, activations: Activations) -> tuple[float, float]:
        """What lies between the first and the last half of `_OUTLIERS`; where codes lie around zero, of magnitudes."""
        edges = self._edges()
        if activations.sym:
            half = _BINS // 2
            magnitudes = self._counts[half:] + self._counts[:half].flip(0)
            largest = float(edges[half + 1 :][_first_reaching(magnitudes, 1 - _OUTLIERS)])
            return max(-largest, self.low), min(largest, self.high)
        low = float(edges[:-1].flip(0)[_first_reaching(self._counts.flip(0), 1 - _OUTLIERS / 2)])
        high = float(edges[1:][_first_reaching(self._counts, 1 - _OUTLIERS / 2)])
        return max(low, self.low), min(high, self.high)

    def _mse(self, activations: Activations) -> tuple[float, float]:
        """The shrunk range whose grid has the least squared error, every value standing in the middle of its bin."""
        edges = self._edges()
        middles = ((edges[1:] + edges[:-1]) / 2).clamp(self.low, self.high).float()
        best, least = (self.low, self.high), torch.inf
        for step in range(_SHRINK_STEPS):
            kept = 1 - step / _SHRINK_STEPS
            low, high = self.low * kept, self.high * kept
            scale, zero = affine(torch.tensor([low]), torch.tensor([high]), activations)
            restored = dequantize(quantize(middles, scale, zero, activations), scale, zero)
            error = float(((restored - middles).double().square() * self._counts).sum())
            if error < least:
                best, least = (low, high), error
        return best

    def _edges(self) -> torch.Tensor:
        return torch.linspace(-self._width, self._width, _BINS + 1, dtype=torch.float64)


def _paired(counts: torch.Tensor) -> torch.Tensor:
    """The same counts in bins twice as wide, around the same middle."""
    quarter = torch.zeros(len(counts) // 4, dtype=counts.dtype)
    return torch.cat([quarter, counts.view(-1, 2).sum(1), quarter])


def _first_reaching(counts: torch.Tensor, share: float) -> int:
    """The bin up to which `share` of all counts lie."""
    return int((counts.cumsum(0) >= share * counts.sum()).nonzero()[0])
