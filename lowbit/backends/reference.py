"""The definition, run as it is written: correct for every scheme, dtype and device, fast for none."""

from lowbit.numerics.qweight import QuantWeight, input_grid
from lowbit.numerics.reference import linear as reference_linear


def available():
    return None


def refuse(scheme, device, dtype, shape):
    return None


def prepare(qweight: QuantWeight):
    """Codes stay one byte each: unpacking them in every call would cost more than the multiplication of a token."""
    qweight.require_natural_order("the reference backend")
    buffers = {"codes": qweight.codes, "scales": qweight.scales}
    if qweight.zeros is not None:
        buffers["zeros"] = qweight.zeros
    return buffers | {name: getattr(qweight, name) for name in input_grid(qweight.scheme)}


def restore(buffers, scheme, shape):
    return QuantWeight(**buffers, scheme=scheme)


def linear(x, buffers, scheme, shape, bias=None):
    return reference_linear(x, restore(buffers, scheme, shape), None if bias is None else bias.to(x.dtype))
