"""Backends run a quantized linear. The first in the table that gives no reason against a layer runs it.

`Backend` is what a module in the table has, `ExpertsBackend` what one has that multiplies by several experts at once,
`RoundingBackend` what one has that is faster where it may round the inputs.
"""

import logging
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch

from lowbit.errors import BackendError, UsageError
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

logger = logging.getLogger("lowbit")

BACKENDS = {
    "triton": "lowbit.backends.triton",
    "triton_int8": "lowbit.backends.triton_int8",
    "native": "lowbit.backends.native",
    "torch_cpu": "lowbit.backends.torch_cpu",
    "int8_cpu": "lowbit.backends.int8_cpu",
    "reference": "lowbit.backends.reference",
}


class Backend(Protocol):
    """A backend module. Weights have no g_idx: layers sort their inputs by group."""

    def available(self) -> str | None:
        """Why it can run nothing at all on this machine, None if it can."""

    def refuse(self, scheme: Scheme, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        """Why it does not run a layer of `shape` (out_features, in_features), whose inputs have `dtype`; of experts,
        (experts, out_features, in_features)."""

    def prepare(self, qweight: QuantWeight) -> dict[str, torch.Tensor]:
        """The buffers of a weight, in the layout that its kernels want."""

    def restore(self, buffers: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantWeight:
        """The exact inverse of `prepare`."""

    def linear(
        self, x: torch.Tensor, buffers: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int],
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x [M, in_features] -> [M, out_features], in the dtype of the scales; bias [out_features]. Differentiable in x
        and bias."""


class ExpertsBackend(Backend, Protocol):
    def experts(
        self, x: torch.Tensor, buffers: dict[str, torch.Tensor], expert_start: torch.Tensor, scheme: Scheme,
        shape: tuple[int, int, int], bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x [M, in_features] sorted by expert -> [M, out_features]. Expert e has the rows [expert_start[e],
        expert_start[e + 1]) of it (int32 [E + 1]); rows after the last give zeros. Buffers and bias [E, ...] are as
        `prepare` gives them for each expert."""


class RoundingBackend(ExpertsBackend, Protocol):
    """`linear_rounded` and `experts_rounded` are `linear` and `experts` on inputs that are rounded where they are
    many."""

    def refuse_rounded(self, scheme: Scheme) -> str | None:
        """Why it never rounds the inputs of a scheme, None if it can."""

    def rounds(self, scheme: Scheme) -> bool:
        """Whether it does by default: where that was measured to cost little and to gain much."""

    def rounded_inputs(self) -> str:
        """What inputs become, and of how many rows, in a few words."""


EXACT = "exact"  # inputs that are multiplied as they are


def inputs_of(name: str, scheme: Scheme, exact: bool | None) -> str:
    """What a backend does to the inputs of a scheme: EXACT, or in a few words how they are rounded. exact: False where
    they may be, None where they are if that was measured to cost little."""
    backend = get_backend(name)
    if exact or not hasattr(backend, "rounds") or backend.refuse_rounded(scheme) is not None:
        return EXACT
    rounded = cast(RoundingBackend, backend)
    return rounded.rounded_inputs() if exact is False or rounded.rounds(scheme) else EXACT


def product_of(name: str, inputs: str, operation: str = "linear"):
    """The function `linear` or `experts` of a backend that does to inputs what `inputs_of` says."""
    return getattr(get_backend(name), operation if inputs == EXACT else f"{operation}_rounded")


def get_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; allowed: {', '.join(BACKENDS)}")
    return cast(Backend, import_module(BACKENDS[name]))


def kernels_for(scheme: Scheme):
    """The backend module that runs a scheme on GPUs, which can also `explain` and `tune`."""
    return get_backend("triton" if scheme.activations is None else "triton_int8")


def choose(
    scheme: Scheme, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], wanted: str | None = None
) -> str:
    """The name of the backend for a layer: `wanted` or an error, else the first that does not refuse.

    Each distinct reason for passing over a backend is logged once.
    """
    name = _first("linear", scheme, device, dtype, shape, wanted)
    if name is None:
        raise BackendError(f"no backend can run {scheme.name} {list(shape)} in {dtype} on {device}")
    return name


def choose_for_experts(
    scheme: Scheme, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], wanted: str | None = None
) -> str | None:
    """The same for a stack of matrices, shape (experts, out_features, in_features). None where no backend multiplies
    by one: they are dequantized one by one then."""
    return _first("experts", scheme, device, dtype, shape, wanted)


def _first(operation: str, scheme, device, dtype, shape, wanted: str | None) -> str | None:
    layers = {"linear": "layers", "experts": "experts"}[operation]
    for name in BACKENDS if wanted is None else [wanted]:
        backend = get_backend(name)
        if not hasattr(backend, operation):
            continue
        reason = backend.refuse(scheme, device, dtype, shape)
        if reason is None:
            return name
        if wanted is not None:
            raise BackendError(
                f"backend {name} cannot run {scheme.name} {list(shape)} in {dtype} on {device}: {reason}"
            )
        # that it cannot run on this machine is worth a warning, that it is made for something else is not
        level = logging.WARNING if reason == backend.available() else logging.INFO
        _log_once(f"backend {name} passes over {scheme.name} {layers}: {reason}", level)
    return None


@cache
def _log_once(message: str, level: int) -> None:
    logger.log(level, message)
