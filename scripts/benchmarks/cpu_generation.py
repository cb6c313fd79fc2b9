"""Generation on this CPU: lowbit beside transformers in bf16, torchao and GPTQModel, in the shapes of Llama-3.2-1B.

    python scripts/benchmarks/cpu_generation.py [--peers-python PYTHON] [--shapes NAME] [--layers N] [--name RESULT]

Batch 1, greedy: tokens per second after a short prompt, and of reading 512 tokens. Each side is a process of its own,
in the interpreter that has it (torchao and GPTQModel: PYTHON), all with the same random weights and the same measuring
code. They take turns, one works at a time. How much faster than transformers: the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import ROOT, WORK, save

import lowbit
from lowbit.bench.bytes_moved import model_bytes
from lowbit.bench.contestants import save_random
from lowbit.bench.loops import LOOPS, prompts
from lowbit.bench.peers import PEERS, Task, load_gptqmodel
from lowbit.bench.random_model import dense_model
from lowbit.bench.shapes import config_of
from lowbit.numerics.scheme import Scheme

SCHEME, BASELINE = Scheme(4, 128), "transformers bf16"
SHORT, NEW, LONG = 16, 33, 512
MARK = "@@"  # in front of a worker's lines: the packages print too


def load_dense(task: Task):
    return lowbit.load(task.folder)


def load_lowbit(task: Task, **options):
    return lowbit.load(task.work / "lowbit", **options)


# side -> (loop, whether it runs in the peers' interpreter, what loads it)
SIDES = {
    BASELINE: ("generate", False, load_dense),
    "lowbit W4A16-G128": ("lowbit", False, load_lowbit),
    "lowbit W4A16-G128, head W8A16-G128": ("lowbit", False, partial(load_lowbit, lm_head="W8A16-G128")),
    "lowbit W4A16-G128, generate": ("generate", False, load_lowbit),
    "torchao int4": ("generate", True, PEERS["torchao int4"].load),
    "GPTQModel": ("generate", True, load_gptqmodel),
    # its weights are rounded once more, to 8 bits
    "GPTQModel torch_int8": ("generate", True, partial(load_gptqmodel, backend="gptq_torch_int8")),
}
PACKAGES = ("torch", "transformers", "torchao", "gptqmodel")


def work(side: str, task: Task) -> None:
    """Load a side, and run what the lines of standard input ask for: prompt tokens, new tokens, number of the round."""
    loop, _, load = SIDES[side]
    model = load(task).eval()
    run, vocabulary = LOOPS[loop](model), model.config.vocab_size
    say({"weights_bytes": model_bytes(model), "versions": {name: found for name in PACKAGES if (found := has(name))}})
    for line in sys.stdin:
        tokens, new, number = map(int, line.split())
        say(asdict(run(prompts(vocabulary, 1, tokens, number, "cpu"), new)))


def has(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(data: dict) -> None:
    print(MARK + json.dumps(data), flush=True)


class Worker:
    def __init__(self, side: str, python: str, task: Task):
        command = [python, __file__, "--worker", side, "--folder", str(task.folder)]
        paths = [str(ROOT), str(ROOT / "triton_kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        log = task.work / f"{side.replace(' ', '-').replace(',', '')}.log"
        self.log = open(log, "w+")  # noqa: SIM115 - until the end
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def hear(self) -> dict | None:
        """The next result, None if the process is gone."""
        line = next((line for line in self.process.stdout if line.startswith(MARK)), None)
        return None if line is None else json.loads(line.removeprefix(MARK))

    def ask(self, *numbers: int) -> dict | None:
        try:
            print(*numbers, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.hear()

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[-1][:300] if lines else "it ended"

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def measure(workers: dict[str, Worker], rounds: int) -> tuple[dict, dict]:
    """({side: {"decode", "prefill": tokens per second of each round}}, {side: why it fell out})."""
    rates, failed = {side: {"decode": [], "prefill": []} for side in workers}, {}
    for number in range(rounds + 1):
        for kind, tokens, new in (("decode", SHORT, NEW), ("prefill", LONG, 2)):
            for side, worker in workers.items():
                timing = None if side in failed else worker.ask(tokens, new, number)
                if timing is None:
                    failed.setdefault(side, worker.last_words())
                elif number:  # the first one warms up
                    done = timing["steps"] / timing["decode_seconds"], tokens / timing["first_seconds"]
                    rates[side][kind].append(done[kind == "prefill"])
                    print(number, side, kind, f"{rates[side][kind][-1]:.2f}", file=sys.stderr, flush=True)
    return rates, failed


def row(side: str, facts: dict, rates: dict[str, dict]) -> dict:
    made = {"side": side, **facts}
    for kind, values in rates[side].items():
        ratios = [mine / base for mine, base in zip(values, rates[BASELINE][kind], strict=True)]
        made[kind] = {"tokens_per_second": statistics.median(values), "spread": [min(values), max(values)],
                      "over_baseline": statistics.median(ratios)}  # fmt: skip
    return made


def prepare(config, folder: Path) -> Task:
    task = Task(folder, folder.parent, SCHEME, torch.bfloat16, "cpu")
    if not folder.exists():
        save_random(dense_model(config, dtype=task.dtype), folder)
    for name, form in (("lowbit", "compressed-tensors"), (f"gptq-{SCHEME.name}", "gptq")):
        if not (task.work / name).exists():
            lowbit.quantize(folder, task.work / name, scheme=SCHEME, format=form)
    return task


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has torchao and gptqmodel")
    parser.add_argument("--shapes", default="llama-3.2-1b", help="as `lowbit bench` names them")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="cpu_generation", help="of the file in results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, Task(args.folder, args.folder.parent, SCHEME, torch.bfloat16, "cpu"))
        return
    config = config_of(args.shapes, args.layers)
    layers = config.num_hidden_layers
    task = prepare(config, WORK / f"cpu-generation-{args.shapes}-{layers}" / "unquantized")
    python = {True: args.peers_python, False: sys.executable}
    workers, facts, failed = {}, {}, {}
    for side, (_, of_peers, _) in SIDES.items():
        worker = Worker(side, python[of_peers], task)
        facts[side] = worker.hear()  # one loads at a time
        if facts[side] is None:
            failed[side] = worker.last_words()
        else:
            workers[side] = worker
    rates, broken = measure(workers, args.rounds)
    for worker in workers.values():
        worker.end()
    failed |= broken
    rows = [row(side, facts[side], rates) for side in workers if side not in failed]
    save(args.name, {"shapes": args.shapes, "layers": layers, "prompt_tokens": SHORT, "new_tokens": NEW,
                     "prefill_tokens": LONG, "rounds": args.rounds, "rows": rows, "failed": failed})  # fmt: skip


if __name__ == "__main__":
    main()
