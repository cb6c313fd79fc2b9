"""Damage to synchronisation that changes nothing, each with its reason: read in the PTX of triton 3.9.0."""

from dataclasses import dataclass

TRITON = "3.9.0"

SAME_WAIT = "its copies join the next group, and the wait at the top of the loop waits for both at the same time"
IN_A_ROW = (
    "barriers around the partial sums follow each other with nothing in shared memory between, and only the stores of "
    "the partial sums in global memory: any two of them order the same accesses"
)
ONE_OF_TWO = "two barriers in a row: the other one orders the same accesses"
LATER_WAIT = (
    "the wgmmas of the next slice take other registers and run in order, and their wait comes before anybody touches "
    "the sums or the registers of this slice"
)
NOTHING_WRITTEN = "all copies of the turn landed before the first of eight fences, and nothing is written between them"
EARLIER_TURN = (
    "the copies that follow write a stage read a turn earlier, which the barrier at the top of the loop orders"
)
BARRIER_BEFORE = "the last turn of the loop has a barrier after its wait for wgmma"
WAITS_ITSELF = "every thread waits at the mbarrier itself right after it"
ONE_LANE = "only one lane touches memory between, and every lane has waited at the mbarrier itself"
NEVER_RUNS = "a state of the workers that no partition is sent to: never executed"


@dataclass(frozen=True)
class Equivalent:
    """configuration: start of an id. ordinals: which of the places of that kind, counted from 1."""

    configuration: str
    gpu: str
    mutation: str
    ordinals: tuple[int, ...]
    reason: str


_SKINNY, _SKINNY_WGMMA = "skinny-w4-g128-sym-bf16-m8-n64", "skinny-w4-g128-sym-bf16-m16-n128"
_GEMM, _INT8, _INT8_WGMMA = "gemm-w4-g128-sym-bf16-m128", "int8-w4-channel-sym-bf16-m8", "int8-w8-g128-sym-bf16-m128"
_HOPPER = "hopper-w4-g128-sym-bf16-m128"

EQUIVALENT = (
    Equivalent(_SKINNY, "sm_80", "group of copies removed", tuple(range(1, 10)), SAME_WAIT),
    Equivalent(_SKINNY, "sm_80", "barrier removed", (5, 6, 7), IN_A_ROW),
    Equivalent(_GEMM, "sm_80", "group of copies removed", (1, 2, 3, 4), SAME_WAIT),
    Equivalent(_INT8, "sm_80", "group of copies removed", (1, 2, 3, 4, 5), SAME_WAIT),
    Equivalent(_INT8, "sm_80", "barrier removed", (5, 6), ONE_OF_TWO),
    Equivalent(_SKINNY_WGMMA, "sm_90", "group of copies removed", tuple(range(1, 10)), SAME_WAIT),
    Equivalent(_SKINNY_WGMMA, "sm_90", "barrier removed", (7, 8), ONE_OF_TWO),
    Equivalent(_SKINNY_WGMMA, "sm_90", "wait for wgmma removed", (1, 2, 3, 5, 6, 7), LATER_WAIT),
    Equivalent(_SKINNY_WGMMA, "sm_90", "wait for one wgmma less", (1, 2, 3, 5, 6, 7), LATER_WAIT),
    Equivalent(_SKINNY_WGMMA, "sm_90", "proxy fence removed", tuple(range(2, 9)), NOTHING_WRITTEN),
    Equivalent(_INT8_WGMMA, "sm_90", "barrier removed", (2,), EARLIER_TURN),
    Equivalent(_INT8_WGMMA, "sm_90", "group of copies removed", (1,), SAME_WAIT),
    Equivalent(_HOPPER, "sm_90", "barrier removed", (5, 16), BARRIER_BEFORE),
    Equivalent(_HOPPER, "sm_90", "barrier removed", (6, 17), WAITS_ITSELF),
    Equivalent(_HOPPER, "sm_90", "barrier removed", (22, 23), NEVER_RUNS),
    Equivalent(_HOPPER, "sm_90", "warp barrier removed", (1, 2), ONE_LANE),
)


def reason(configuration: str, gpu: str, mutation: str, ordinal: int) -> str | None:
    """Why a mutant changes nothing, if it is listed. ordinal: from 1."""
    for one in EQUIVALENT:
        here = configuration.startswith(one.configuration) and (gpu, mutation) == (one.gpu, one.mutation)
        if here and ordinal in one.ordinals:
            return one.reason
    return None
