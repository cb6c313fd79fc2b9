"""From the command to the first token: `lowbit generate`, and beside it what no command can do without.

    python scripts/benchmarks/start_up.py [--rounds N]

Random W4A16 checkpoint with the shapes of Llama-3.2-1B and the tokenizer of the embedded model. In each round, in turn
and each in a process of its own, once with the files dropped from the page cache and once with the files in it:

- `needed`: imports torch and transformers with the class of the model, then reads the weight files once.
- `generate`: `lowbit generate` up to its first token.

Seconds are of the wall clock, from the start of the process; cpu_seconds those that all threads computed: the two tell
a busy machine from slow code. Phases of `generate` are what the main thread does. Reading goes on beside it:
`read_ahead` is when the last byte was in the page cache, in seconds from the start of the process.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# What a process prints to be read by the one that started it
RESULT = "start_up: "
SIDES = {
    "needed": ("torch", "transformers", "model_class", "reading"),
    "generate": ("imports", "config_and_skeleton", "tensors", "prepare", "first_token"),
}
CACHES = ("cold", "warm")


class Marks:
    """Ends of phases, in seconds from the start of the process."""

    def __init__(self, started: float):
        self.started, self.marks = started, [("start", 0.0, 0.0)]
        self.read_ahead: float | None = None

    def now(self) -> float:
        return time.perf_counter() - self.started

    def end(self, phase: str) -> None:
        self.marks.append((phase, self.now(), time.process_time()))

    def ending(self, phase: str, function):
        """`function`, whose return is the end of a phase."""

        def marked(*args, **kwargs):
            result = function(*args, **kwargs)
            self.end(phase)
            return result

        return marked

    def beginning(self, before: str, function):
        """`function`, whose call is the end of the phase before it."""

        def marked(*args, **kwargs):
            self.end(before)
            return function(*args, **kwargs)

        return marked

    def show(self) -> None:
        spans = [(name, *(b - a for a, b in zip(start, end, strict=True)))
                 for (_, *start), (name, *end) in itertools.pairwise(self.marks)]  # fmt: skip
        found = {
            "seconds": {name: seconds for name, seconds, _ in spans},
            "cpu_seconds": {name: seconds for name, _, seconds in spans},
            "read_ahead": self.read_ahead,
        }
        print(RESULT + json.dumps(found), file=sys.stderr, flush=True)


def run_needed(folder: str, marks: Marks) -> None:
    import torch  # noqa: F401

    marks.end("torch")
    import transformers

    marks.end("transformers")
    getattr(transformers, "LlamaForCausalLM")  # noqa: B009 - imported when it is asked for
    marks.end("model_class")
    read_once(Path(folder))
    marks.end("reading")
    marks.show()


def run_generate(folder: str, marks: Marks) -> None:
    """The command, with marks in it, ended after the first token."""
    from contextlib import contextmanager

    from lowbit.cli.commands import generate as command
    from lowbit.cli.main import main
    from lowbit.system import read_ahead

    heavy_imports, read = command.heavy_imports, read_ahead._read

    @contextmanager
    def marked_imports():
        with heavy_imports():
            yield
        marks.end("imports")
        mark_phases(marks)

    def marked_read(*args) -> None:
        read(*args)
        marks.read_ahead = marks.now()

    command.heavy_imports, read_ahead._read = marked_imports, marked_read
    sys.argv = ["lowbit", "generate", folder, "--prompt", "import os", "--max-new-tokens", "1"]
    main()


def mark_phases(marks: Marks) -> None:
    """Once transformers is imported: marks where it hands over to the quantizer, and at the first token."""
    from transformers.quantizers import HfQuantizer

    from lowbit.generation.answer import Answer

    def first(self, tokens):
        marks.end("first_token")
        marks.show()
        return take(self, tokens)

    take, Answer.take = Answer.take, first
    HfQuantizer.preprocess_model = marks.ending("config_and_skeleton", HfQuantizer.preprocess_model)
    HfQuantizer.postprocess_model = marks.ending("prepare", marks.beginning("tensors", HfQuantizer.postprocess_model))


def read_once(folder: Path) -> None:
    buffer = bytearray(2**20)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def sample(side: str, folder: Path) -> dict:
    # compiled files of lowbit are kept as an installed package has them
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, __file__, "--once", side, str(folder), str(time.perf_counter())]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = next(line for line in run.stderr.splitlines() if line.startswith(RESULT))
    return json.loads(found.removeprefix(RESULT))


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def total(one: dict, kind: str = "seconds") -> float:
    return sum(one[kind].values())


def summary(samples: list[dict]) -> dict:
    phases = samples[0]["seconds"]
    reading = [one["read_ahead"] for one in samples if one["read_ahead"] is not None]
    return {
        "seconds": {name: spread([one["seconds"][name] for one in samples]) for name in phases},
        "cpu_seconds": {name: spread([one["cpu_seconds"][name] for one in samples]) for name in phases},
        "total_seconds": spread([total(one) for one in samples]),
        "total_cpu_seconds": spread([total(one, "cpu_seconds") for one in samples]),
        **({"read_ahead": spread(reading)} if reading else {}),
    }


def checkpoint() -> Path:
    """The quantized model, made once."""
    from common import WORK, llama_1b

    import lowbit

    folder = WORK / "llama-3.2-1b-w4a16-text"
    if not folder.exists():
        lowbit.quantize(llama_1b(), folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(lowbit.resolve("reference") / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", nargs=3, metavar=("SIDE", "FOLDER", "STARTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        side, folder, started = arguments.once
        {"needed": run_needed, "generate": run_generate}[side](folder, Marks(float(started)))
        return

    from common import save
    from load_time import drop_from_cache

    folder, runs = checkpoint(), {(side, cache): [] for cache in CACHES for side in SIDES}
    for side in SIDES:
        sample(side, folder)  # compiles the kernels and the files of lowbit
    for number in range(arguments.rounds):
        for cache in CACHES:
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                {"cold": drop_from_cache, "warm": read_once}[cache](folder)
                runs[side, cache].append(sample(side, folder))
        # after each round: on a busy machine, all of them can take longer than there is
        result = {"model": "Llama-3.2-1B shapes, random, W4A16-G128", "rounds": number + 1,
                  "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                  "load_average": os.getloadavg()}  # fmt: skip
        for (side, cache), samples in runs.items():
            result[f"{side}, {cache}"] = summary(samples)
        for cache in CACHES:
            pairs = zip(runs["generate", cache], runs["needed", cache], strict=True)
            result[f"generate / needed, {cache}"] = spread([total(ours) / total(needed) for ours, needed in pairs])
        save("start_up", result)


if __name__ == "__main__":
    main()
