"""How much memory a quantized weight takes once a backend has prepared it."""

from functools import cache

import torch

from lowbit.backends import choose, get_backend
from lowbit.numerics.qweight import QuantWeight
from lowbit.numerics.scheme import Scheme

# Rows of the weight that is prepared to see what a row takes: layouts have tiles of fewer
_ROWS = 128


@cache
def bytes_in_memory(scheme: Scheme, rows: int, in_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a weight [rows, in_features] in the layout of the backend that runs it.

    Layouts are not what files hold: some widen codes or scales. A piece of the weight is prepared, and measured.

    Args:
        scheme: Of weights alone.
        rows: out_features, of all experts together.
        in_features: Of a row.
        dtype: Of its scales.
        device: Where it is.

    Raises:
        BackendError: Nothing runs it there.
    """
    backend = get_backend(choose(scheme, device, dtype, (rows, in_features)))
    few = min(rows, _ROWS)
    groups = scheme.groups(in_features)
    zeros = None if scheme.sym else torch.zeros(few, groups, dtype=torch.uint8, device=device)
    codes = torch.zeros(few, in_features, dtype=torch.uint8, device=device)
    scales = torch.ones(few, groups, dtype=dtype, device=device)
    buffers = backend.prepare(QuantWeight(codes, scales, scheme, zeros))
    return sum(buffer.nbytes for buffer in buffers.values()) * rows // few
