"""Generation on this CPU: lowbit beside transformers in bf16, torchao, GPTQModel and llama.cpp, in the shapes of
Llama-3.2-1B.

    python scripts/benchmarks/cpu_generation.py [--peers-python PYTHON] [--llama-bench BINARY] [--ik-llama-bench BINARY]

Greedy: tokens per second after a short prompt, in batches too, and of reading 512 tokens. Each side is a process of its
own, in the interpreter that has it (torchao and GPTQModel: PYTHON), all with the same random weights and the same
measuring code; `rivals` are measured by their own. They take turns, one works at a time. How much faster than
transformers: the median of the rounds' ratios. What memory gives when it is read is measured in the same rounds.
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
from common import ROOT, WORK, read_bandwidth, save
from rivals import Rival

import lowbit
from lowbit.bench.bytes_moved import model_bytes, step_bytes
from lowbit.bench.contestants import save_random
from lowbit.bench.loops import LOOPS, prompts
from lowbit.bench.peers import PEERS, Task, load_gptqmodel
from lowbit.bench.random_model import dense_model
from lowbit.bench.shapes import config_of
from lowbit.layers.inputs import inputs_of_model
from lowbit.layers.linear import LowbitLinear
from lowbit.native.build import library
from lowbit.numerics.scheme import Scheme

SCHEME, BASELINE = Scheme(4, 128), "transformers bf16"
SHORT, NEW, LONG = 16, 33, 512
# What is measured -> sequences, tokens of each prompt, tokens that are made
KINDS = {"decode": (1, SHORT, NEW), "prefill": (1, LONG, 2), "decode 8": (8, SHORT, NEW), "decode 16": (16, SHORT, NEW)}
# The numbers that a GGUF file holds as Q4_0 and Q8_0
SHARED = "W4A16-G32, head W8A16-G32"
MARK = "@@"  # in front of a worker's lines: the packages print too


def load_dense(task: Task):
    return lowbit.load(task.folder)


def load_lowbit(task: Task, name: str = "lowbit", **options):
    return lowbit.load(task.work / name, **options)


# side -> (loop, whether it runs in the peers' interpreter, what loads it)
SIDES = {
    BASELINE: ("generate", False, load_dense),
    "lowbit W4A16-G128": ("lowbit", False, load_lowbit),
    "lowbit W4A16-G128, head W8A16-G128": ("lowbit", False, partial(load_lowbit, lm_head="W8A16-G128")),
    f"lowbit {SHARED}": ("lowbit", False, partial(load_lowbit, name="shared")),
    f"lowbit {SHARED}, --exact": ("lowbit", False, partial(load_lowbit, name="shared", exact=True)),
    "lowbit W4A16-G128, generate": ("generate", False, load_lowbit),
    "torchao int4": ("generate", True, PEERS["torchao int4"].load),
    "GPTQModel": ("generate", True, load_gptqmodel),
    # its weights are rounded once more, to 8 bits
    "GPTQModel torch_int8": ("generate", True, partial(load_gptqmodel, backend="gptq_torch_int8")),
}
PACKAGES = ("torch", "transformers", "torchao", "gptqmodel")


def work(side: str, task: Task) -> None:
    """Load a side, and run what the lines of standard input ask for: sequences, prompt tokens, new tokens, round."""
    loop, _, load = SIDES[side]
    model = load(task).eval()
    run, vocabulary = LOOPS[loop](model), model.config.vocab_size
    versions = {name: found for name in PACKAGES if (found := has(name))}
    say({"weights_bytes": model_bytes(model), "step_bytes": step_bytes(model, 1, SHORT + NEW // 2),
         "weights": products(model), "inputs": inputs_of_model(model), "versions": versions})  # fmt: skip
    for line in sys.stdin:
        batch, tokens, new, number = map(int, line.split())
        say(asdict(run(prompts(vocabulary, batch, tokens, number, "cpu"), new)))


def products(model) -> int:
    """Weights that each token is multiplied by: all but the output embedding, whose product is of the last token."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, LowbitLinear | torch.nn.Linear) and m is not head]
    return sum(linear.in_features * linear.out_features for linear in linears)


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


def measure(workers: dict[str, "Worker | Rival"], rounds: int) -> tuple[dict, dict, list[float]]:
    """({side: {kind: tokens per second of each round}}, {side: why it fell out}, GB/s of reading in each round)."""
    rates: dict = {side: {} for side in workers}
    failed: dict[str, str] = {}
    bandwidths = []
    for number in range(rounds + 1):
        bandwidths.append(read_bandwidth())
        for kind, (batch, tokens, new) in KINDS.items():
            for side, worker in workers.items():
                alone = side == BASELINE or isinstance(worker, Rival)  # batches are for lowbit alone
                if side in failed or (alone and batch > 1):
                    continue
                short = alone and not number  # to warm them up, which keep nothing from run to run
                timing = worker.ask(batch, SHORT if short else tokens, min(new, 3) if short else new, number)
                if timing is None:
                    failed.setdefault(side, worker.last_words())
                elif number:  # the first one warms up
                    decoded, read = timing["steps"] / timing["decode_seconds"], tokens / timing["first_seconds"]
                    rates[side].setdefault(kind, []).append(batch * (read if kind == "prefill" else decoded))
                    print(number, side, kind, f"{rates[side][kind][-1]:.2f}", file=sys.stderr, flush=True)
    return rates, failed, bandwidths[1:]


def row(side: str, facts: dict, rates: dict[str, dict], bandwidth: float) -> dict:
    """bandwidth: GB/s of reading, of which decoding shows its share."""
    made = {"side": side, **facts}
    for kind, values in rates[side].items():
        rate = statistics.median(values)
        made[kind] = {"tokens_per_second": rate, "spread": [min(values), max(values)]}
        if kind in rates.get(BASELINE, {}):
            ratios = [mine / base for mine, base in zip(values, rates[BASELINE][kind], strict=True)]
            made[kind]["over_baseline"] = statistics.median(ratios)
        if kind == "decode" and "step_bytes" in facts:
            made[kind]["gb_per_s"] = rate * facts["step_bytes"] / 1e9
            made[kind]["share_of_reading"] = made[kind]["gb_per_s"] / bandwidth
        if kind == "prefill" and "weights" in facts:
            made[kind]["gop_per_s_per_core"] = 2 * rate * facts["weights"] / 1e9 / torch.get_num_threads()
    return made


def prepare(config, folder: Path) -> Task:
    task = Task(folder, folder.parent, SCHEME, torch.bfloat16, "cpu")
    if not folder.exists():
        save_random(dense_model(config, dtype=task.dtype), folder)
    for name, form in (("lowbit", "compressed-tensors"), (f"gptq-{SCHEME.name}", "gptq")):
        if not (task.work / name).exists():
            lowbit.quantize(folder, task.work / name, scheme=SCHEME, format=form)
    if not (task.work / "shared").exists():
        lowbit.quantize(folder, task.work / "shared", scheme="W4A16-G32", lm_head="W8A16-G32")
    return task


def rivals_of(args: argparse.Namespace, task: Task) -> dict[str, Rival]:
    """Those whose binaries are named, on a GGUF file of the same numbers."""
    binaries = {
        "llama.cpp Q4_0, head Q8_0": (args.llama_bench, ()),
        "ik_llama.cpp Q4_0, head Q8_0, repacked": (args.ik_llama_bench, ("-rtr", "1")),
    }
    if not any(binary for binary, _ in binaries.values()):
        return {}
    folder = task.work / "gguf"
    if not folder.exists():
        lowbit.convert(task.work / "shared", folder, format="gguf")
    (gguf,) = folder.glob("*.gguf")
    threads = torch.get_num_threads()
    return {side: Rival(binary, gguf, threads, extra) for side, (binary, extra) in binaries.items() if binary}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has torchao and gptqmodel")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's binary of this name")
    parser.add_argument("--ik-llama-bench", type=Path, help="ik_llama.cpp's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="but for rivals, who are named")
    parser.add_argument("--prepare-only", action="store_true", help="write the models that are measured, and end")
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
    config.tie_word_embeddings = False  # a head of its own, which sides may hold in other formats
    layers = config.num_hidden_layers
    task = prepare(config, WORK / f"cpu-generation-{args.shapes}-{layers}" / "unquantized")
    rivals = rivals_of(args, task)
    if args.prepare_only:
        return
    python = {True: args.peers_python, False: sys.executable}
    workers, facts, failed = {}, {}, {}
    for side in [*args.sides, *rivals]:
        worker = rivals.get(side) or Worker(side, python[SIDES[side][1]], task)
        facts[side] = worker.hear()  # one loads at a time
        if facts[side] is None:
            failed[side] = worker.last_words()
        else:
            workers[side] = worker
    rates, broken, bandwidths = measure(workers, args.rounds)
    for worker in workers.values():
        worker.end()
    failed |= broken
    bandwidth = statistics.median(bandwidths)
    rows = [row(side, facts[side], rates, bandwidth) for side in workers if side not in failed]
    save(args.name, {"shapes": args.shapes, "layers": layers, "prompt_tokens": SHORT, "new_tokens": NEW,
                     "prefill_tokens": LONG, "rounds": args.rounds, "instructions": library().level,
                     "read_gb_per_s": bandwidth, "rows": rows, "failed": failed})  # fmt: skip


if __name__ == "__main__":
    main()
