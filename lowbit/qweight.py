"""QuantWeight: the one currency in which quantizers, formats and backends meet."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.scheme import Scheme


@dataclass(frozen=True)
class QuantWeight:
    """A quantized weight [N, K] = [out_features, in_features];  w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g].

    codes: uint8 [N, K], in [0, 2^bits).  scales: floating [N, G].  zeros: uint8 [N, G], None when symmetric, which
    means 2^(bits-1) everywhere.  g_idx: int32 [K], the group of each input, None when it is k // (K / G).
    The checks look at shapes and dtypes only, so that meta tensors work.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    def __post_init__(self):
        out_features, in_features = self.codes.shape
        expected = (out_features, self.scheme.groups(in_features))
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}, expected torch.uint8")
        if tuple(self.scales.shape) != expected:
            raise ValueError(
                f"scales have shape {tuple(self.scales.shape)}, expected {expected} for {self.scheme.name}"
            )
        if (self.zeros is None) != self.scheme.sym:
            raise ValueError(f"{self.scheme.name} {'takes no' if self.scheme.sym else 'needs'} zeros")
        if self.zeros is not None and (self.zeros.dtype != torch.uint8 or tuple(self.zeros.shape) != expected):
            raise ValueError(f"zeros are {self.zeros.dtype} {tuple(self.zeros.shape)}, expected torch.uint8 {expected}")

    def require_natural_order(self, reader: str) -> None:
        """Raise ValueError if the groups are not consecutive inputs; for readers that cannot hold a g_idx."""
        if self.g_idx is not None:
            raise ValueError(f"{reader} has no act-order: it cannot hold g_idx")

    def in_group_order(self) -> tuple["QuantWeight", torch.Tensor | None]:
        """This weight with its inputs sorted by group, and the order [K] in which it takes them: W x = W' x[order].
        (itself, None) without a g_idx."""
        if self.g_idx is None:
            return self, None
        order = torch.argsort(self.g_idx, stable=True)
        return QuantWeight(self.codes[:, order], self.scales, self.scheme, self.zeros), order

    def in_input_order(self, order: torch.Tensor) -> "QuantWeight":
        """The inverse of `in_group_order`."""
        back = torch.argsort(order)
        g_idx = back // self.scheme.group_of(self.in_features)
        return QuantWeight(self.codes[:, back], self.scales, self.scheme, self.zeros, g_idx.to(torch.int32))

    def rows(self, start: int, stop: int) -> "QuantWeight":
        """Outputs [start, stop); views."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantWeight(self.codes[start:stop], self.scales[start:stop], self.scheme, zeros, self.g_idx)

    @classmethod
    def concatenated(cls, weights: Sequence["QuantWeight"]) -> "QuantWeight":
        """The outputs of all, one after the other. Weights of one scheme and one g_idx."""
        first = weights[0]
        zeros = None if first.zeros is None else torch.cat([weight.zeros for weight in weights])
        codes, scales = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scales"))
        return cls(codes, scales, first.scheme, zeros, first.g_idx)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @classmethod
    def meta(cls, out_features: int, in_features: int, scheme: Scheme, dtype: torch.dtype) -> "QuantWeight":
        """The shapes and dtypes of a quantized weight without its data, for planning files."""
        groups = scheme.groups(in_features)
        return cls(
            codes=torch.empty(out_features, in_features, dtype=torch.uint8, device="meta"),
            scales=torch.empty(out_features, groups, dtype=dtype, device="meta"),
            scheme=scheme,
            zeros=None if scheme.sym else torch.empty(out_features, groups, dtype=torch.uint8, device="meta"),
        )
