"""Does any instruction touch the registers of a wgmma that may still be running?

A Hopper wgmma reads its left operand from registers, and adds into its accumulators, while the warp runs on; only
`WARPGROUP.DEPBAR.LE gsb0, n` says that all but the n newest groups are through. Triton 3.6 lets the next iteration of a
loop overwrite a left operand before that wait (triton-lang/triton issue 9433): the product is then wrong now and then,
which no test on data proves absent. So the machine code is walked instead: from each wgmma along every path to the wait
that covers it.

A second rule, of triton-lang/triton issue 11047: one thread that tells the producer "this tile is read" must not do so
before all warps have waited for their wgmmas, so a CTA-wide barrier has to lie between the wait and the arrival.
"""

import re
from dataclasses import dataclass

from aot.sass import Instruction, Program

# HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ; a left operand in shared memory is gdesc[..] as well
WGMMA = re.compile(r"^[HIQ]GMMA\.64x(?P<columns>\d+)x\d+\.(?P<type>\w+)")
OPERANDS = re.compile(r"^R(?P<sum>\d+), R(?P<left>\d+)(?:\.\w+)*, gdesc")
WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x(?P<newest>[0-9a-f]+)")
LEFT_REGISTERS = 4  # 64 rows of 32 bytes over the 128 threads of a warpgroup


@dataclass(frozen=True)
class Hazard:
    wgmma: str
    victim: str  # what touches its registers too early
    what: str


def closes(instruction: Instruction) -> bool:
    """Is this the last wgmma of its group?"""
    return bool(WGMMA.match(instruction.text)) and "gsb0" in instruction.operands


def register_wgmmas(program: Program) -> list[int]:
    return [
        index
        for index, instruction in enumerate(program.code)
        if WGMMA.match(instruction.text) and OPERANDS.match(instruction.operands)
    ]


def conflict(instruction: Instruction, left: range, sums: range) -> str | None:
    if WGMMA.match(instruction.text):
        return None  # wgmmas run in order
    if set(instruction.written) & set(left):
        return "overwrites the left operand"
    if set(instruction.written) & set(sums):
        return "overwrites accumulators"
    if any(number in sums for number in instruction.named):
        return "reads accumulators"
    return None


def check_one(program: Program, start: int) -> Hazard | None:
    """Walk every path from the wgmma at `start`. State: is its group closed yet, and how many groups came after it."""
    wgmma = program.code[start]
    found, shape = OPERANDS.match(wgmma.operands), WGMMA.match(wgmma.text)
    left = range(int(found["left"]), int(found["left"]) + LEFT_REGISTERS)
    registers = int(shape["columns"]) // (4 if shape["type"] == "F16" else 2)
    sums = range(int(found["sum"]), int(found["sum"]) + registers)

    most = 8  # groups in flight beyond this change nothing: no kernel waits for so few
    paths = [(index, closes(wgmma), 0) for index in program.successors(start)]
    seen = set(paths)
    while paths:
        index, closed, later = paths.pop()
        instruction = program.code[index]
        wait = WAIT.match(instruction.text)
        if wait and closed and later >= int(wait["newest"], 16):
            continue
        if what := conflict(instruction, left, sums):
            return Hazard(wgmma.text, instruction.text, what)
        if closes(instruction):
            closed, later = True, min(later + closed, most)
        for follower in program.successors(index):
            if (state := (follower, closed, later)) not in seen:
                seen.add(state)
                paths.append(state)
    return None


def check(program: Program) -> list[Hazard]:
    """One hazard at most for each wgmma with its left operand in registers."""
    found = (check_one(program, index) for index in register_wgmmas(program))
    return [hazard for hazard in found if hazard is not None]


def early_arrivals(program: Program) -> list[str]:
    """Arrivals at an mbarrier that can be reached from a wait for wgmmas without a barrier between."""
    found = set()
    for start, instruction in enumerate(program.code):
        if not WAIT.match(instruction.text):
            continue
        paths = program.successors(start)
        seen = set(paths)
        while paths:
            index = paths.pop()
            if program.code[index].op.startswith(("BAR.SYNC", "BAR.RED")):
                continue
            if program.code[index].op.startswith("SYNCS.ARRIVE"):
                found.add(program.code[index].text)
            fresh = [follower for follower in program.successors(index) if follower not in seen]
            seen.update(fresh)
            paths += fresh
    return sorted(found)
