"""Every shipped configuration on the smallest shape that says something: three turns of its loop, two row tiles, and
split as it ships.

Kernels are imported inside of functions: the process that names a run is not the one that compiles it (process.py)."""

import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from aot.shipped import SHIPPED, Shipped

if TYPE_CHECKING:
    from executed.problems import Comparison, Weight

# Makes launches with numbers from the generator, and compares their results (problems.Comparison)
Problem = Callable[[torch.Generator], list]
TURNS = 3
LAUNCHES = 2  # of a split kernel: the second must find the counters at zero


@dataclass
class Result:
    """What a run found. problems: rules that were broken and results that are wrong, [] if it is right."""

    case: str
    gpu: str
    seed: int
    problems: list[str]
    worst: float  # the largest error as a part of its tolerance
    relative: float  # error of the product
    launches: int
    instructions: int  # executed, of threads
    covered: float  # part of the instructions that any thread executed
    cpu_seconds: float  # compiling included
    opcodes: dict[str, int] = field(default_factory=dict)

    def report(self, most: int = 10) -> str:
        return f"{self.case} on {self.gpu}, seed {self.seed}:\n" + "\n".join(self.problems[:most])


def pairs() -> list[tuple[str, str]]:
    """(id of a configuration, GPU it is executed for)."""
    return [(one.id, target) for one in SHIPPED for target in one.targets]


def find(name: str) -> Shipped:
    return next(one for one in SHIPPED if one.id == name)


def seed_of(name: str, gpu: str) -> int:
    """Another one for each test, the same in each run."""
    return zlib.crc32(f"{name} {gpu}".encode()) % 100000


def run_shipped(name: str, gpu: str, seed: int, change: Callable[[str], str] | None = None) -> Result:
    """In a process that has imported the kernels without the interpreter (process.py). change: of the PTX."""
    return run_on(gpu, seed, name, lambda generator: launch(find(name), generator), change)


def executed_and_shipped(name: str, gpu: str) -> tuple[str, str]:
    """PTX that a run executes, and PTX that scripts/kernel_report.py checks."""
    from aot import measure, shipped

    texts: list[str] = []
    run_shipped(name, gpu, 0, lambda text: texts.append(text) or text)
    return texts[0], measure.compiled(shipped.call(find(name)), gpu).asm["ptx"]


def run_on(gpu: str, seed: int, name: str, problem: Problem, change: Callable[[str], str] | None = None) -> Result:
    """Run a problem on the machine."""
    from machine.driver import on_machine
    from machine.program import PtxError

    torch.manual_seed(seed)
    started = time.process_time()
    with on_machine(int(gpu.removeprefix("sm_")), seed=seed, change=change) as session:
        try:
            compared, unknown = problem(torch.Generator().manual_seed(seed)), []
        except PtxError as error:
            compared, unknown = [], [str(error)]
    problems = unknown + session.problems()
    problems += [f"{one.what}: error {one.worst:.3g} times the tolerance" for one in compared if one.wrong]
    executed, code, seen, opcodes = 0, 0, 0, {}
    for one in {id(e.launch.compiled): e.launch.compiled for e in session.executed}.values():
        run = sum((e.launch.executed for e in session.executed if e.launch.compiled is one), start=Counter())
        code += len(one.program.code)
        for segment, threads in run.items():
            instructions = one.instructions(segment)
            seen += len(instructions)
            executed += threads * len(instructions)
            for instruction in instructions:
                opcodes[instruction.opcode] = opcodes.get(instruction.opcode, 0) + threads
    return Result(
        name, gpu, seed, problems, 
        max((one.worst for one in compared), default=0.0), max((one.relative for one in compared), default=0.0),
        len(session.executed), executed, seen / code if code else 0.0, time.process_time() - started, opcodes,
    )  # fmt: skip


def launch(shipped: Shipped, generator: torch.Generator) -> "list[Comparison]":
    """The comparisons of one configuration."""
    from executed import problems

    kernel, launches = shipped.kernel, LAUNCHES if shipped.split > 1 and shipped.kernel != "hopper" else 1
    if kernel.startswith("gptq"):
        return problems.run_gptq(kernel.removeprefix("gptq_"), shipped.group, 20, shipped.bits, generator)
    if kernel.startswith("quantize"):
        dtype = problems.DTYPES[shipped.dtype]
        x = torch.randn(3, shipped.group, generator=generator).to(dtype)
        norm = torch.randn(shipped.group, generator=generator).to(dtype) if kernel.endswith("normed") else None
        return problems.run_quantize(x, norm=norm)
    inputs = TURNS * turn(shipped) * shipped.split
    inputs = -(-inputs // max(shipped.group, 1)) * max(shipped.group, 1)
    out_features = 2 * shipped.block_n if kernel == "dequantize" else max(shipped.block_n, 64)
    weight = problems.Weight(
        shipped.bits, shipped.group, shipped.sym, shipped.dtype, shipped.block_m + 3, out_features, inputs,
        bias=kernel == "hopper", generator=generator,
    )  # fmt: skip
    return configured(shipped, weight, launches)


def tiles(shipped: Shipped) -> int:
    """K tiles of a turn of the loop."""
    from lowbit_kernels.skinny import long_tiles

    if shipped.kernel == "skinny":
        return long_tiles(shipped.bits, shipped.block_m, shipped.block_n)
    return 2 if shipped.kernel == "int8" and shipped.split > 1 else 1


def turn(shipped: Shipped) -> int:
    """Inputs of a turn of the loop."""
    from lowbit_kernels.layout import SLICES

    if shipped.kernel == "hopper":
        return 2 * 128
    return tiles(shipped) * (128 if shipped.kernel == "int8" else 32 * SLICES[shipped.bits])


def configured(shipped: Shipped, weight: "Weight", launches: int) -> "list[Comparison]":
    """A product in the blocks of a configuration."""
    from executed import problems
    from lowbit_kernels import gemm, gemm_hopper, launching, skinny
    from lowbit_kernels.int8 import kernel as int8

    n, m, split, warps, stages = shipped.block_n, shipped.block_m, shipped.split, shipped.warps, shipped.stages
    if shipped.kernel == "skinny":
        return problems.run_skinny(weight, skinny.Config(n, m, split, tiles(shipped), warps, stages), launches)
    if shipped.kernel == "gemm":
        launching.JOINABLE = True  # the package refuses joined slices for more releases than get them wrong
        return problems.run_gemm(weight, gemm.Config(n, m, shipped.joined, warps=warps, stages=stages))
    if shipped.kernel == "hopper":
        return problems.run_hopper(weight, gemm_hopper.Config(m, stages, split), launches)
    if shipped.kernel == "int8":
        config = int8.Config(n, m, split, tiles(shipped), warps=warps, stages=stages)
        return problems.run_int8(weight, config, launches=launches)
    return problems.run_dequantize(weight)
