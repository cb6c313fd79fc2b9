"""Damage to synchronisation that changes nothing, each with its reason: read in the PTX of triton 3.9.0."""

from dataclasses import dataclass

TRITON = "3.9.0"

SAME_WAIT = "its copies join the next group, and the wait at the top of the loop waits for both at the same time"
IN_A_ROW = (
    "barriers around the partial sums follow each other with nothing in shared memory between, and only the stores of "
    "the partial sums in global memory: any two of them order the same accesses"
)
ONE_OF_TWO = "two barriers in a row: the other one orders the same accesses"


@dataclass(frozen=True)
class Equivalent:
    """configuration: start of an id. ordinals: which of the places of that kind, counted from 1."""

    configuration: str
    gpu: str
    mutation: str
    ordinals: tuple[int, ...]
    reason: str


EQUIVALENT = (
    Equivalent("skinny-w4-g128-sym-bf16-m8-n64", "sm_80", "group of copies removed", tuple(range(1, 10)), SAME_WAIT),
    Equivalent("skinny-w4-g128-sym-bf16-m8-n64", "sm_80", "barrier removed", (5, 6, 7), IN_A_ROW),
    Equivalent("gemm-w4-g128-sym-bf16-m128", "sm_80", "group of copies removed", (1, 2, 3, 4), SAME_WAIT),
    Equivalent("int8-w4-channel-sym-bf16-m8", "sm_80", "group of copies removed", (1, 2, 3, 4, 5), SAME_WAIT),
    Equivalent("int8-w4-channel-sym-bf16-m8", "sm_80", "barrier removed", (5, 6), ONE_OF_TWO),
)


def reason(configuration: str, gpu: str, mutation: str, ordinal: int) -> str | None:
    """Why a mutant changes nothing, if it is listed. ordinal: from 1."""
    for one in EQUIVALENT:
        here = configuration.startswith(one.configuration) and (gpu, mutation) == (one.gpu, one.mutation)
        if here and ordinal in one.ordinals:
            return one.reason
    return None
