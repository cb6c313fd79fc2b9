"""One launch of each kernel with random tensors, and what float64 says it must give.

A launch goes through the package's own launcher; whoever runs it decides what executes it. Results are compared element
by element: one rounding to the dtype of the output, and float32 sums in any order before it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit_kernels import gemm, gemm_hopper, gptq, launching, layout, reference, skinny
from lowbit_kernels.int8 import kernel as int8
from lowbit_kernels.int8 import layout as int8_layout
from lowbit_kernels.int8 import quantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# Of the largest result: float32 sums of a few thousand products
SUMS = 2e-6


@dataclass
class Comparison:
    """worst: the largest error as a part of its tolerance, NaN where a result is; relative: of the whole result."""

    what: str
    worst: float
    relative: float

    @property
    def wrong(self) -> bool:
        return not self.worst <= 1


@dataclass
class Weight:
    """A weight [out_features, in_features] and x [rows, in_features]. group: inputs of a group or -1 (per channel)."""

    bits: int
    group: int
    sym: bool
    dtype: str
    rows: int
    out_features: int
    in_features: int
    padding: int = 0  # elements between rows of x
    bias: bool = False
    residual: bool = False
    exact: bool = False  # y in float32
    generator: torch.Generator = field(default_factory=torch.Generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=self.generator)

    def quantized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """codes, scales, zeros."""
        groups = 1 if self.group < 0 else self.in_features // self.group
        codes = self.integers(2**self.bits, self.out_features, self.in_features)
        scales = torch.rand(self.out_features, groups, generator=self.generator) * 0.02 + 0.001
        zeros = None if self.sym else self.integers(2**self.bits, self.out_features, groups)
        return codes, scales.to(DTYPES[self.dtype]), zeros

    def inputs(self) -> torch.Tensor:
        """x, with NaN between its rows."""
        x = self.normal(self.rows, self.in_features + self.padding).to(DTYPES[self.dtype])
        x[:, self.in_features :] = float("nan")
        return x[:, : self.in_features]


def compare(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | float) -> Comparison:
    """tolerance: of each element, or 0 for equal bits."""
    error = (got.double() - expected.double()).abs()
    worst = (error / tolerance).max() if isinstance(tolerance, torch.Tensor) else (error > 0).double().max() * 2
    relative = error.norm() / expected.double().norm().clamp(min=1e-300)
    return Comparison(what, float(worst if not error.isnan().any() else error.sum()), float(relative))


def compare_rounded(what: str, got: torch.Tensor, expected: torch.Tensor, sums: float = SUMS) -> Comparison:
    """expected: float64, before the one rounding of the output."""
    size = expected.abs()
    return compare(what, got, expected, UNIT_ROUNDOFF[got.dtype] * size * (1 + 1e-6) + sums * float(size.max()))


def compare_counters(workspace: launching.Workspace) -> list[Comparison]:
    """A split launch leaves its counters at zero."""
    return [compare("counters", c, torch.zeros_like(c), 0) for c in workspace.counters]


def exact_weight(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    return reference.dequantize(codes, scales, zeros, bits).double()


def run_skinny(weight: Weight, config: skinny.Config, launches: int = 1) -> list[Comparison]:
    codes, scales, zeros = weight.quantized()
    shape = layout.Layout.of(codes, scales, zeros, weight.bits)
    packed, meta = layout.pack(codes, scales, zeros, weight.bits)
    x, (bias, residual) = weight.inputs(), added(weight)
    expected = with_added(x.double() @ exact_weight(codes, scales, zeros, weight.bits).T, bias, residual)
    workspace, found = launching.Workspace(x.device), []
    for _ in range(launches):
        out = output(weight)
        y = skinny.launch(x, packed, meta, shape, config, bias=bias, residual=residual, out=out, workspace=workspace)
        found.append(compare_rounded("product", y, expected))
    return found + compare_counters(workspace)


def output(weight: Weight) -> torch.Tensor | None:
    """None: the launcher makes it, in the dtype of x."""
    return torch.empty(weight.rows, weight.out_features, dtype=torch.float32) if weight.exact else None


def added(weight: Weight) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bias in the dtype of x, and residual in that of y."""
    dtype = DTYPES[weight.dtype]
    bias = weight.normal(weight.out_features).to(dtype) if weight.bias else None
    of_y = torch.float32 if weight.exact else dtype
    residual = weight.normal(weight.rows, weight.out_features).to(of_y) if weight.residual else None
    return bias, residual


def with_added(y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
    return y + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())


def scaled_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, weight: Weight
) -> torch.Tensor:
    """As `gemm` multiplies it: in 16 bits, but per channel exact."""
    exact = exact_weight(codes, scales, zeros, weight.bits)
    return exact if scales.shape[1] == 1 else exact.to(DTYPES[weight.dtype]).double()


def run_gemm(weight: Weight, config: gemm.Config) -> list[Comparison]:
    codes, scales, zeros = weight.quantized()
    shape = layout.Layout.of(codes, scales, zeros, weight.bits)
    packed, meta = layout.pack(codes, scales, zeros, weight.bits)
    x, (bias, residual) = weight.inputs(), added(weight)
    y = gemm.launch(x, packed, meta, shape, config, bias=bias, residual=residual, out=output(weight))
    expected = with_added(x.double() @ scaled_weight(codes, scales, zeros, weight).T, bias, residual)
    return [compare_rounded("product", y, expected)]


@contextlib.contextmanager
def any_device() -> Iterator[None]:
    """gemm_hopper asks for a Hopper GPU, which the machine is not."""
    refusal, gemm_hopper.refusal = gemm_hopper.refusal, lambda *_: None
    try:
        yield
    finally:
        gemm_hopper.refusal = refusal


def run_hopper(weight: Weight, config: gemm_hopper.Config, launches: int = 1) -> list[Comparison]:
    codes, scales, zeros = weight.quantized()
    shape = layout.Layout.of(codes, scales, zeros, weight.bits)
    packed, meta = layout.pack(codes, scales, zeros, weight.bits)
    x, (bias, _) = weight.inputs(), added(weight)
    exact = exact_weight(codes, scales, zeros, weight.bits).to(DTYPES[weight.dtype]).double()
    expected = with_added(x.double() @ exact.T, bias)
    workspace, found = launching.Workspace(x.device), []
    with any_device():
        for _ in range(launches):
            y = gemm_hopper.launch(x, packed, meta, shape, config, bias=bias, workspace=workspace)
            found.append(compare_rounded("product", y, expected))
    return found + compare_counters(workspace)


def run_dequantize(weight: Weight) -> list[Comparison]:
    codes, scales, zeros = weight.quantized()
    shape = layout.Layout.of(codes, scales, zeros, weight.bits)
    packed, meta = layout.pack(codes, scales, zeros, weight.bits)
    expected = reference.dequantize(codes, scales, zeros, weight.bits).to(DTYPES[weight.dtype])
    return [compare("dequantized", gemm.dequantize(packed, meta, shape), expected, 0)]


def run_int8(weight: Weight, config: int8.Config, asymmetric: bool = False, launches: int = 1) -> list[Comparison]:
    """asymmetric: rows of x have zero points."""
    dtype = DTYPES[weight.dtype]
    shape = int8_layout.Int8Layout(weight.bits, weight.group, dtype, weight.out_features, weight.in_features)
    codes = weight.integers(2**weight.bits, weight.out_features, weight.in_features)
    scales = torch.rand(weight.out_features, shape.groups, generator=weight.generator) * 0.02 + 0.001
    packed, packed_scales = int8_layout.pack(codes, scales, shape)
    x = torch.zeros(weight.rows, shape.padded_in, dtype=torch.int8)
    x[:, : weight.in_features] = weight.integers(128, *x[:, : weight.in_features].shape, low=-128, dtype=torch.int8)
    x_scales = torch.rand(weight.rows, generator=weight.generator)
    x_zeros = weight.integers(128, weight.rows, low=-128, dtype=torch.int8) if asymmetric else None
    sums = int8_layout.row_sums(codes, scales, shape) if asymmetric else None
    bias, _ = added(weight)
    x_codes = x[:, : weight.in_features]
    expected = reference.int8_linear(x_codes, x_scales, x_zeros, codes, scales, weight.bits, bias).double()
    workspace, found = launching.Workspace(x.device), []
    for _ in range(launches):
        y = int8.launch(
            x, x_scales, packed, packed_scales, shape, config, x_zeros=x_zeros, sums=sums, bias=bias,
            out=output(weight), workspace=workspace,
        )  # fmt: skip
        found.append(compare_rounded("product", y, expected))
    return found + compare_counters(workspace)


def run_quantize(x: torch.Tensor, sym: bool = True, norm: torch.Tensor | None = None) -> list[Comparison]:
    """Equal to the bit; behind a norm, whose sum of squares has another order here, codes may be off by one."""
    eps = 1e-6
    codes, scales, zeros = quantize.rows(x, sym=sym, norm_weight=norm, eps=eps)
    values = x.float()
    if norm is not None:
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * norm.float()
    want_codes, want_scales, want_zeros = reference.quantize_rows(values, sym)
    padded = torch.zeros_like(codes)
    padded[:, : x.shape[1]] = want_codes
    one, relative = (0, 0) if norm is None else (torch.ones(()), want_scales.double() * 1e-6)
    found = [compare("codes", codes, padded, one), compare("scales", scales, want_scales, relative)]
    return found if zeros is None else [*found, compare("zeros", zeros, want_zeros, one)]


def run_gptq(name: str, length: int, rows: int, bits: int, generator: torch.Generator) -> list[Comparison]:
    """`columns` or `descend` against plain float32, operation by operation: equal to the bit."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    levels = 2**bits
    if name == "columns":
        problem: tuple[Any, ...] = (
            normal(length, rows), normal(length, length) * 0.1, normal(length).square(),
            normal(3, rows).abs() * 0.1 + 0.2, torch.randint(0, levels, (3, rows), generator=generator).float(),
        )  # fmt: skip
        got, expected = gptq.columns(*problem, levels), plain_columns(*problem, levels)
    else:
        inner = normal(length, length) * 0.1
        inner.diagonal().abs_().add_(0.5)
        codes, zeros = (torch.randint(0, levels, s, generator=generator).float() for s in ((length, rows), (rows,)))
        problem = (codes, normal(rows).abs() * 0.1 + 0.2, zeros, normal(length, rows), inner)
        got, expected = gptq.descend(*problem, levels), plain_descend(*problem, levels)
    return [compare(f"result {n}", a, b, 0) for n, (a, b) in enumerate(zip(got, expected, strict=True))]


def plain_columns(target, feedback, costs, scales, zeros, levels) -> tuple[torch.Tensor, ...]:
    """gptq.columns one operation at a time: the codes of the cheapest grid, that grid and its cost."""
    best = None
    for scale, zero in zip(scales, zeros, strict=True):
        fed, cost, codes = torch.zeros_like(target), torch.zeros_like(scale), []
        for k in range(len(target)):
            now = target[k] + fed[k]
            step = (now / scale).clamp(-zero, levels - 1 - zero).round()
            value = step * scale
            off, error = now - value, target[k] - value
            cost = cost + costs[k] * off * off
            codes.append(step + zero)
            fed[k + 1 :] = fed[k + 1 :] + feedback[k, k + 1 :, None] * error
        new = (torch.stack(codes), scale, zero, cost)
        best = new if best is None else [torch.where(cost < best[3], a, b) for a, b in zip(new, best, strict=True)]
    return tuple(best)


def plain_descend(codes, scales, zeros, pull, inner, levels) -> tuple[torch.Tensor, ...]:
    """gptq.descend one operation at a time: codes, moves and what they gain."""
    fed, found, moves, gain = torch.zeros_like(pull), [], [], torch.zeros_like(scales)
    for k in range(len(codes)):
        force = pull[k] - fed[k]
        now = (codes[k] - zeros) * scales
        step = ((now + force / inner[k, k]) / scales).clamp(-zeros, levels - 1 - zeros).round()
        moved = step * scales - now
        gain = gain + moved * (2 * force - inner[k, k] * moved)
        found.append(step + zeros)
        moves.append(moved)
        fed[k + 1 :] = fed[k + 1 :] + inner[k, k + 1 :, None] * moved
    return torch.stack(found), torch.stack(moves), gain
