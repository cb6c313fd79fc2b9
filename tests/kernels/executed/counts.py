"""What a kernel executes for each weight: instructions by kind, sectors of global memory, bank conflicts."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from machine.global_memory import TENSOR_BITS
from machine.program import Instruction
from machine.threads import LANES, Array

if TYPE_CHECKING:
    from aot.shipped import Shipped

SECTOR = 32  # bytes of global memory that are moved together
BANKS, BANK_BYTES = 32, 4
# Opcodes by what they do, the first that fits
KINDS = {
    "tensor core": ("mma", "wgmma"),
    "global memory": ("ld.global", "st.global", "atom", "cp.async.ca", "cp.async.cg", "cp.async.bulk"),
    "shared memory": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "waiting": ("bar", "barrier", "mbarrier", "cp.async", "fence", "setmaxnreg"),
    "branches": ("bra", "brx", "ret"),
    "moves": ("mov", "cvta", "ld.param", "selp"),
}
FLOAT_TYPES = ("f32", "bf16", "f16", "bf16x2", "f16x2")


def kind_of(opcode: str) -> str:
    """A key of KINDS, "float" or "integer"."""
    for kind, prefixes in KINDS.items():
        if any(opcode == prefix or opcode.startswith((prefix + ".", prefix + "::")) for prefix in prefixes):
            return kind
    return "float" if set(opcode.split(".")[-2:]) & set(FLOAT_TYPES) else "integer"


@dataclass
class Accesses:
    """An Observer (machine/threads.py). By tensor number; wavefronts of shared memory, and the fewest possible."""

    touched: Counter = field(default_factory=Counter)  # sectors that warps touch, instruction by instruction
    bytes: Counter = field(default_factory=Counter)  # that they ask for, each once an instruction
    places: dict[int, list[Array]] = field(default_factory=dict)
    wavefronts: int = 0
    ideal: int = 0

    def global_access(self, instruction: Instruction, threads: Array, address: Array, size: int) -> None:
        if not len(threads):
            return
        tensor = int(address[0]) >> TENSOR_BITS
        warp = (threads // LANES).astype(np.int64) << 40
        first = (address & np.uint64((1 << TENSOR_BITS) - 1)).astype(np.int64)
        every = first[:, None] + np.arange(0, size, min(size, 4))
        self.touched[tensor] += len(np.unique(warp[:, None] + every // SECTOR))
        self.bytes[tensor] += len(np.unique(warp[:, None] + every)) * min(size, 4)
        self.places.setdefault(tensor, []).append(np.unique(every // 4))

    def words(self, tensor: int) -> int:
        """Different words of a tensor that anybody asks for."""
        return len(np.unique(np.concatenate(self.places[tensor])))

    def shared_access(self, instruction: Instruction, threads: Array, at: Array, size: int) -> None:
        """Lanes whose accesses make up 128 bytes go together; of a bank one word at a time."""
        lanes = max(1, BANKS * BANK_BYTES // max(size, BANK_BYTES))
        together = threads // lanes
        words = (at[:, None] // BANK_BYTES + np.arange(max(1, size // BANK_BYTES))).ravel()
        group = np.unique(np.repeat(together, max(1, size // BANK_BYTES)), return_inverse=True)[1]
        distinct = np.unique(np.stack([group, words]), axis=1)
        in_bank = np.zeros((group.max() + 1, BANKS), int)
        np.add.at(in_bank, (distinct[0], distinct[1] % BANKS), 1)
        self.wavefronts += int(in_bank.max(1).sum())
        self.ideal += len(in_bank)


@dataclass
class Counted:
    """instructions: of threads, for each weight that a row tile multiplies, by kind. By tensor: sectors, touched over
    what instructions ask for; repeats, how often a word is asked for. wavefronts: of shared memory, over the fewest
    possible. bits: read for a weight, of codes and meta words. issued, integer: of ptxas's machine code for a weight,
    start and end of the programs included, and the part that shifts and masks; loop, loop_integer: of the loop alone.
    None where warps run different code."""

    configuration: str
    gpu: str
    rows: int
    instructions: dict[str, float]
    sectors: dict[str, float]
    repeats: dict[str, float]
    wavefronts: float
    bits: float
    issued: float | None = None
    integer: float | None = None
    loop: float | None = None
    loop_integer: float | None = None


def count(name: str, gpu: str, rows: int, in_features: int) -> Counted:
    """A shipped configuration on a weight of one block of rows, whose inputs one program has, as of a large weight.
    In a process of process.py."""
    import torch
    from machine.driver import on_machine

    from executed import problems
    from executed.shipped_runs import configured, find

    shipped, accesses = replace(find(name), split=1), Accesses()
    out_features = max(shipped.block_n, 64)
    weight = problems.Weight(
        shipped.bits, shipped.group, shipped.sym, shipped.dtype, rows, out_features, in_features,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with on_machine(int(gpu.removeprefix("sm_")), races=False, observer=accesses) as session:
        compared = configured(shipped, weight, launches=1)
    if problems_found := session.problems() + [one.what for one in compared if one.wrong]:
        raise ValueError(f"{name} on {gpu}: {problems_found[0]}")
    (executed,) = session.executed
    weights = out_features * in_features * -(-rows // shipped.block_m)
    kinds: Counter = Counter()
    for segment, threads in executed.launch.executed.items():
        for instruction in executed.launch.compiled.instructions(segment):
            kinds[kind_of(instruction.opcode)] += threads
    names = {n: executed.launch.memory.tensors[n - 1].name for n in accesses.touched}
    stored = sum(accesses.words(n) for n, name in names.items() if name in ("weight", "meta", "scales"))
    threads = executed.launch.program.threads * int(np.prod(executed.grid))
    return Counted(
        name, gpu, rows, {kind: round(number / weights, 4) for kind, number in kinds.most_common()},
        {names[n]: round(accesses.touched[n] * SECTOR / accesses.bytes[n], 3) for n in names},
        {names[n]: round(accesses.bytes[n] / accesses.words(n) / 4, 3) for n in names},
        round(accesses.wavefronts / max(accesses.ideal, 1), 3), round(stored * 32 / weights, 3),
        **({} if shipped.kernel == "hopper" else issued(shipped, gpu, threads / weights)),
    )  # fmt: skip


def issued(shipped: "Shipped", gpu: str, threads: float) -> dict[str, float]:
    """Instructions of the machine code for a weight. threads: of a launch for each weight, as it was executed; each is
    once at the start and the end, and in the loop for as long as there are weights."""
    from aot import measure, sass
    from aot.shipped import call

    result = measure.compiled(call(shipped), gpu)
    program = sass.parse(measure.tool("nvdisasm", "-c", cubin=result.asm["cubin"]))
    loop, code = program.hot_loop(), [one for one in program.code if one.op != "NOP"]  # they lie behind the end
    weights = measure.weights_per_thread(loop, shipped.block_m)
    found = {}
    for all_of_it, of_the_loop, names in (("issued", "loop", ("",)), ("integer", "loop_integer", sass.LOGIC)):
        once = sass.count(code, *names) - sass.count(loop, *names)
        passed = sass.count(loop, *names) / weights
        found[of_the_loop], found[all_of_it] = round(passed, 3), round(passed + once * threads, 3)
    return found
