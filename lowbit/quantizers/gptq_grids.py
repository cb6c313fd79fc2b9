"""Grids of a group in GPTQ: which are tried, and what all groups have chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# Ranges tried for each group in its turn, relative to that of its targets, and in a sweep, to that of its grid
SHRINKS = (1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_RETRIED = (0.9, 0.95, 1.0, 1.05, 1.1)
# Groups longer than this take the grid that spans their targets
LONGEST_SEARCHED = 512


@dataclass
class Grid:
    """What codes stand for, (code - zero) * scale, in one group of each row: float32 [N], or C candidates [C, N].

    scales: as they are stored, of either sign, never zero. zeros: whole numbers that are codes.
    """

    scales: torch.Tensor
    zeros: torch.Tensor

    def __len__(self) -> int:
        return len(self.scales)

    def rows(self, part: slice) -> Grid:
        return Grid(self.scales[..., part], self.zeros[..., part])

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self.zeros) * self.scales

    def nearest(self, values: torch.Tensor, levels: int) -> torch.Tensor:
        return (values / self.scales).round_().add_(self.zeros).clamp_(0, levels - 1)


def spanning(target: torch.Tensor, shrinks: tuple[float, ...], scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Candidates that span the range of targets [g, N], times each of `shrinks`."""
    shrunk = target.new_tensor(shrinks).unsqueeze(1)
    if scheme.sym:
        # all 2^bits codes: the largest |w| lies on the lowest code, whichever sign that takes
        largest = target.gather(0, target.abs().argmax(0, keepdim=True))
        scales = storable(-largest * shrunk / scheme.middle, dtype)
        return Grid(scales, torch.full_like(scales, scheme.middle))
    low = target.amin(0).clamp(max=0) * shrunk
    high = target.amax(0).clamp(min=0) * shrunk
    scales = storable((high - low) / (scheme.levels - 1), dtype)
    grids = Grid(scales, (-low / scales).round_().clamp_(0, scheme.levels - 1))
    return _with_shifts(grids, scheme) if len(shrinks) > 1 else grids


def around(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Candidates around the grid of each row."""
    scales = storable(grid.scales * grid.scales.new_tensor(_RETRIED).unsqueeze(1), dtype)
    return _with_shifts(Grid(scales, grid.zeros.expand(len(_RETRIED), -1)), scheme)


def _with_shifts(grids: Grid, scheme: Scheme) -> Grid:
    """Add the same with zeros moved by one, where zeros are free and codes are few."""
    if scheme.sym or scheme.bits > 3:
        return grids
    zeros = torch.cat([grids.zeros, grids.zeros + 1, grids.zeros - 1])
    return Grid(grids.scales.repeat(3, 1), zeros.clamp_(0, scheme.levels - 1))


def storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 scales to what a file of `dtype` will hold, never zero and never infinite."""
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    sign = torch.where(scales < 0, -1.0, 1.0)
    return (sign * scales.abs().clamp(least, limits.max)).to(dtype).float()


@dataclass
class Solution:
    """All groups quantized, on transposed matrices, in the order of quantization.

    codes and error (W - Q): float32 [K, N]. scales and zeros: float32 [G, N]. cost: float64 [N], the objective of each
    row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    error: torch.Tensor
    cost: torch.Tensor

    @classmethod
    def empty(cls, target: torch.Tensor, group: int) -> Solution:
        """Make room for the solution of targets [K, N]."""
        inputs, rows = target.shape
        scales, zeros = (target.new_empty(inputs // group, rows) for _ in range(2))
        cost = target.new_zeros(rows, dtype=torch.float64)
        return cls(torch.empty_like(target), scales, zeros, torch.empty_like(target), cost)

    @property
    def group(self) -> int:
        return len(self.codes) // len(self.scales)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Number and columns of each group."""
        return ((n, slice(n * self.group, (n + 1) * self.group)) for n in range(len(self.scales)))

    def grid(self, number: int) -> Grid:
        """The grid of a group: views, not copies."""
        return Grid(self.scales[number], self.zeros[number])

    def as_weight(self, order: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantWeight:
        """Put columns and groups back to where they were before `order`, int64 [K]."""
        columns = torch.argsort(order)
        groups = torch.argsort(order.view(-1, self.group)[:, 0])
        codes = self.codes[columns].T.to(torch.int16).to(torch.uint8).contiguous()
        zeros = None if scheme.sym else self.zeros[groups].T.to(torch.uint8).contiguous()
        return QuantWeight(codes, self.scales[groups].T.to(dtype).contiguous(), scheme, zeros)
