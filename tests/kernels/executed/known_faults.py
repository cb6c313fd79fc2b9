"""What a release of Triton is known to get wrong in kernels that ship. Found by the machine, known upstream."""

from dataclasses import dataclass

from aot.shipped import Shipped

UNFENCED = "reads asynchronously what was written generically, without a proxy fence"
Version = tuple[int, ...]


@dataclass(frozen=True)
class KnownFault:
    """rules: one of them is part of every problem that a run has because of it."""

    name: str
    rules: tuple[str, ...]
    fixed_in: Version

    def explains(self, problem: str) -> bool:
        return any(rule in problem for rule in self.rules)


# cp.async writes x through the generic proxy, wgmma reads it through the asynchronous one
MISSING_FENCE = KnownFault(
    "no fence.proxy.async between cp.async and wgmma (pytorch issue 181248, triton pull requests 9610 and 10537)",
    (UNFENCED,),
    (3, 7, 1),
)
# The registers of one slice are taken for another while a wgmma still reads them
JOINED_SLICES = KnownFault(
    "joined slices of a dot overwrite registers of running wgmmas (triton issue 9433)",
    ("register of a running wgmma is written", "wgmma without a fence", "times the tolerance", UNFENCED),
    (3, 8),
)


def version_of(text: str) -> Version:
    """The numbers of `3.7.1` or `3.7.1+git1234`."""
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:3] if part.isdigit())


def copies_feed_wgmma(shipped: Shipped, gpu: str) -> bool:
    """Triton multiplies by wgmma from four warps on, and `gemm_hopper` loads x by TMA."""
    return gpu == "sm_90" and shipped.kernel in ("skinny", "gemm", "int8") and shipped.warps >= 4


def known_fault(shipped: Shipped | None, gpu: str, triton: str) -> KnownFault | None:
    """shipped: None for any kernel that the package does not refuse."""
    if shipped and shipped.joined > 1 and version_of(triton) < JOINED_SLICES.fixed_in:
        return JOINED_SLICES
    wgmma = gpu == "sm_90" if shipped is None else copies_feed_wgmma(shipped, gpu)
    return MISSING_FENCE if wgmma and version_of(triton) < MISSING_FENCE.fixed_in else None
