"""The decode loop on the machine: lowbit's own captures of a step, replayed; and what must be noticed in it."""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from executed.source_damage import DECODE_FAULTS

if TYPE_CHECKING:
    from executed.decode_step import DecodeStep
    from executed.device import Device
    from lowbit.generation.steps.graph import CudaGraphs

TOKENS = 2  # of each replay of the loop
CLOSE = 3e-2  # logits to those in float32, relative


@dataclass
class DecodeResult:
    """problems: what was wrong, [] if nothing. launches, instructions: executed, of threads; operators: launches of a
    step; opcodes: different ones."""

    gpu: str
    problems: list[str]
    launches: int
    instructions: int
    operators: int
    tokens: list[list[int]]
    cpu_seconds: float = 0.0


def run_decode(gpu: str, seed: int, tokens: int = TOKENS, small: bool = False) -> DecodeResult:
    """Eagerly; then captured by lowbit.generation.steps.graph.CudaGraphs and replayed from the start, twice on the same
    buffers, another graph of the same step in between. In a process of process.py."""
    import time

    from machine.driver import on_machine

    from executed.decode_step import DecodeStep
    from executed.device import Device
    from lowbit.generation.steps.graph import CudaGraphs

    started = time.process_time()
    # shipped_runs.py looks for races within a launch
    with torch.no_grad(), on_machine(int(gpu.removeprefix("sm_")), seed=seed, races=False) as session:
        device = Device(session)
        steps = [DecodeStep(torch.Generator().manual_seed(0), small) for _ in range(2)]
        with device.installed():
            result = _run(device, steps, CudaGraphs(torch.device("cpu")), tokens)
    result.gpu, result.cpu_seconds = gpu, time.process_time() - started
    return result


def _run(device: "Device", steps: "list[DecodeStep]", graphs: "CudaGraphs", tokens: int) -> DecodeResult:
    expected = decoded(steps[0], steps[0].plainly, tokens)
    eager = decoded(steps[0], steps[0], tokens)
    device.settle()
    problems = []
    error = float((eager[0][0] - expected[0][0]).norm() / expected[0][0].norm())  # later tokens may differ by rounding
    if not error < CLOSE:
        problems.append(f"logits are {error:.2g} away from those in float32")
    try:
        replays = [graphs.capture(step, torch.Generator()) for step in steps]
    except RuntimeError as refused:
        return DecodeResult("", [*problems, str(refused)], device.launches, device.instructions, 0, [])
    for number in (0, 1, 0):
        found = differing(decoded(steps[number], replays[number], tokens), eager)
        problems += [f"{what} of a replay are not those of the step" for what in found]
    one, other = device.graphs
    if one.shares(other):
        problems.append("kernels of two streams share memory that they write")
    return DecodeResult(
        "", device.problems + problems, device.launches, device.instructions, len(one.launches),
        [tokens.tolist() for _, tokens in eager],
    )  # fmt: skip


def decoded(step: "DecodeStep", advance: Callable[[], None], tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and tokens, from the start."""
    step.begin()
    found = []
    for _ in range(tokens):
        advance()
        found.append((step.logits.clone(), step.tokens.clone()))
    return found


def differing(found: list, expected: list) -> list[str]:
    """What is not equal to the bit: sums of split inputs have one order."""
    pairs = [
        pair for a, b in zip(found, expected, strict=True) for pair in zip(("logits", "tokens"), a, b, strict=True)
    ]
    return sorted({what for what, a, b in pairs if not torch.equal(a, b)})


def run_faulty(name: str) -> list[str]:
    """The problems of a small step with one of DECODE_FAULTS, in a process of process.py. It imports what is slow to
    import and not damaged, and forks another, which imports the damaged package."""
    import machine.driver  # noqa: F401
    import transformers.generation  # noqa: F401

    from executed import source_mutations

    with source_mutations.damaged_package(DECODE_FAULTS[name]) as folder:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, context, sys.path.insert, (0, str(folder))) as pool:
            return pool.submit(run_decode, "sm_90", 0, 1, True).result().problems
