"""What a release of Triton is known to get wrong in kernels that ship. Found by the machine, known upstream."""

from dataclasses import dataclass

from aot.shipped import Shipped

UNFENCED = "reads asynchronously what was written generically, without a proxy fence"
Version = tuple[int, ...]


@dataclass(frozen=True)
class KnownFault:
    """rule: part of every problem that a run has because of it."""

    name: str
    rule: str
    fixed_in: Version


# cp.async writes x through the generic proxy, wgmma reads it through the asynchronous one
MISSING_FENCE = KnownFault(
    "no fence.proxy.async between cp.async and wgmma (pytorch issue 181248, triton pull requests 9610 and 10537)",
    UNFENCED,
    (3, 7, 1),
)


def version_of(text: str) -> Version:
    """The numbers of `3.7.1` or `3.7.1+git1234`."""
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:3] if part.isdigit())


def copies_feed_wgmma(shipped: Shipped, gpu: str) -> bool:
    """Triton multiplies by wgmma from four warps on, and `gemm_hopper` loads x by TMA."""
    return gpu == "sm_90" and shipped.kernel in ("skinny", "gemm", "int8") and shipped.warps >= 4


def known_fault(shipped: Shipped | None, gpu: str, triton: str) -> KnownFault | None:
    """shipped: None for any kernel."""
    wgmma = gpu == "sm_90" if shipped is None else copies_feed_wgmma(shipped, gpu)
    return MISSING_FENCE if wgmma and version_of(triton) < MISSING_FENCE.fixed_in else None
