"""Backends run a quantized linear. The first in the table that gives no reason against a layer runs it.

A backend module has
`refuse(scheme, device, dtype, shape) -> reason or None`  with shape (out_features, in_features), dtype of x;
`prepare(QuantWeight) -> dict[str, Tensor]`, the buffers in the layout its kernels want; there is no g_idx, layers
sort their inputs by group;
`restore(buffers, scheme, shape) -> QuantWeight`, the exact inverse;
`linear(x, buffers, scheme, shape, bias=None) -> y`, x [M, in_features] in the dtype of the scales, bias
[out_features]; differentiable in x and bias;
`available() -> reason or None`, whether it can run anything on this machine at all.

One that can multiply rows by the matrices of several experts at once also has
`experts(x, buffers, expert_start, scheme, shape, bias=None) -> y`, x [M, in_features] sorted by expert, expert e having
the rows [expert_start[e], expert_start[e + 1]) of it (int32 [E + 1]; rows after the last give zeros), buffers and bias
[E, ...] as `prepare` gives them for each expert; its `refuse` is asked with shape (E, out_features, in_features) then.
"""

import logging
from functools import cache
from importlib import import_module

import torch

from lowbit.errors import BackendError, UsageError
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


def get_backend(name: str):
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; allowed: {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name])


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
