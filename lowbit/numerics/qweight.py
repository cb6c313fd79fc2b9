"""QuantWeight: the one currency in which quantizers, formats and backends meet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowbit.numerics.scheme import Scheme


def input_grid(scheme: Scheme) -> tuple[str, ...]:
    """The fields of a weight that hold the grid of its inputs: none, unless the scheme fixes it."""
    if scheme.activations is None or not scheme.is_static:
        return ()
    return ("input_scale",) if scheme.activations.sym else ("input_scale", "input_zero")


@dataclass(frozen=True)
class QuantWeight:
    """A quantized weight [N, K] = [out_features, in_features];  w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g].

    codes: uint8 [N, K], in [0, 2^bits).  scales: floating [N, G].  zeros: uint8 [N, G], None when symmetric, which
    means 2^(bits-1) everywhere.  g_idx: int32 [K], the group of each input, None when it is k // (K / G).
    input_scale: float32 [1], input_zero: int8 [1], the grid of the inputs where the scheme fixes one (static
    activations); input_zero is None where it lies around zero.
    The checks look at shapes and dtypes only, so that meta tensors work.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None

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
        stored = input_grid(self.scheme)
        for name, dtype in (("input_scale", torch.float32), ("input_zero", torch.int8)):
            tensor = getattr(self, name)
            if (tensor is not None) != (name in stored):
                raise ValueError(f"{self.scheme.name} {'needs' if name in stored else 'takes no'} {name}")
            if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (1,)):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} (1,)")

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
        return replace(self, codes=self.codes[:, order], g_idx=None), order

    def in_input_order(self, order: torch.Tensor) -> "QuantWeight":
        """The inverse of `in_group_order`."""
        back = torch.argsort(order)
        g_idx = back // self.scheme.group_of(self.in_features)
        return replace(self, codes=self.codes[:, back], g_idx=g_idx.to(torch.int32))

    def with_inputs(
        self, scheme: Scheme, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
    ) -> "QuantWeight":
        """This weight for inputs quantized as `scheme` says, which differs in its activations only."""
        return replace(self, scheme=scheme, input_scale=scale, input_zero=zero)

    def rows(self, start: int, stop: int) -> "QuantWeight":
        """Outputs [start, stop); views, but for a grid of inputs: tensors of a file may not share memory."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        grid = {name: getattr(self, name).clone() for name in input_grid(self.scheme)}
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=zeros, **grid)

    @classmethod
    def concatenated(cls, weights: Sequence["QuantWeight"], codes: torch.Tensor | None = None) -> "QuantWeight":
        """The outputs of all, one after the other. Weights of one scheme, one g_idx and one grid of inputs. codes:
        those of all, where the weights have slices of one tensor: they are not copied then."""
        first = weights[0]
        zeros = None if first.zeros is None else torch.cat([w.zeros for w in weights if w.zeros is not None])
        codes = torch.cat([w.codes for w in weights]) if codes is None else codes
        scales = torch.cat([w.scales for w in weights])
        return replace(first, codes=codes, scales=scales, zeros=zeros)

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

        def empty(*shape: int, of: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        return cls(
            codes=empty(out_features, in_features),
            scales=empty(out_features, groups, of=dtype),
            scheme=scheme,
            zeros=None if scheme.sym else empty(out_features, groups),
            input_scale=empty(1, of=torch.float32) if "input_scale" in input_grid(scheme) else None,
            input_zero=empty(1, of=torch.int8) if "input_zero" in input_grid(scheme) else None,
        )
