"""Backends run a quantized linear. The first in the table that gives no reason against a layer runs it.

A backend module has
`refuse(scheme, device, dtype, shape) -> reason or None`  with shape (out_features, in_features), dtype of x;
`prepare(QuantWeight) -> dict[str, Tensor]`, the buffers in the layout its kernels want;
`restore(buffers, scheme, shape) -> QuantWeight`, the exact inverse;
`linear(x, buffers, scheme, shape) -> y`, x [M, in_features] in the dtype of the scales, differentiable in x;
`available() -> reason or None`, whether it can run anything on this machine at all.
"""

import logging
from functools import cache
from importlib import import_module

import torch

from lowbit.errors import BackendError, UsageError
from lowbit.scheme import Scheme

logger = logging.getLogger("lowbit")

BACKENDS = {
    "triton": "lowbit.backends.triton",
    "torch_cpu": "lowbit.backends.torch_cpu",
    "reference": "lowbit.backends.reference",
}


def get_backend(name: str):
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; allowed: {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name])


def choose(
    scheme: Scheme, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], wanted: str | None = None
) -> str:
    """The name of the backend for a layer: `wanted` or an error, else the first that does not refuse.

    Each distinct reason for passing over a backend is logged once.
    """
    if wanted is not None:
        reason = get_backend(wanted).refuse(scheme, device, dtype, shape)
        if reason:
            raise BackendError(
                f"backend {wanted} cannot run {scheme.name} {list(shape)} in {dtype} on {device}: {reason}"
            )
        return wanted
    for name in BACKENDS:
        reason = get_backend(name).refuse(scheme, device, dtype, shape)
        if reason is None:
            return name
        _log_once(f"backend {name} passes over {scheme.name} layers: {reason}")
    raise BackendError(f"no backend can run {scheme.name} {list(shape)} in {dtype} on {device}")


@cache
def _log_once(message: str) -> None:
    logger.info(message)
