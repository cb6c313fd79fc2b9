"""From a fresh process to the first token: lowbit, transformers with the bf16 model, transformers with
compressed-tensors, and reading the file once beside them.

    python scripts/benchmarks/load_time.py [--backend NAME]

Random checkpoint with the shapes of Llama-3.2-1B. Each sample is a process of its own. "cold" samples start with the
files dropped from the page cache (posix_fadvise), "warm" ones find them there. Seconds are of the wall clock,
cpu_seconds those that all threads computed: the two tell a busy machine from slow code. Memory is anonymous (pages of
the files, which safetensors maps, can be dropped at any time and are not counted), sampled every few milliseconds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROUNDS = 3
# (side, cache): what is measured in each round
SAMPLES = (("lowbit", "cold"), ("lowbit", "warm"), ("bf16", "cold"), ("compressed-tensors", "cold"))
PHASES = ("imports", "skeleton", "tensors", "prepare", "first_token")
PROMPT = 16


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most anonymous memory of this process from start to `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._stopped = 0, threading.Event()
        self.start()

    def run(self):
        while not self._stopped.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.bytes


def measure_once(side: str, folder: str, backend: str | None) -> None:
    """In a process of its own: print the seconds of each phase, and the memory of loading, as JSON."""
    marks = [("start", time.perf_counter(), time.process_time())]

    def mark(name):
        marks.append((name, time.perf_counter(), time.process_time()))

    import torch
    from transformers import LlamaForCausalLM
    from transformers.quantizers import HfQuantizer

    load, options = LlamaForCausalLM.from_pretrained, {"dtype": "auto"}
    if side == "lowbit":
        import lowbit

        load, options = lowbit.load, {"backend": backend}
    mark("imports")

    def marking(method, before, after):
        def marked(*args, **kwargs):
            if before:
                mark(before)
            result = method(*args, **kwargs)
            mark(after)
            return result

        return marked

    HfQuantizer.preprocess_model = marking(HfQuantizer.preprocess_model, None, "skeleton")
    HfQuantizer.postprocess_model = marking(HfQuantizer.postprocess_model, "tensors", "prepare")
    before, peak = anonymous_bytes(), Peak()
    model = load(folder, **options)
    peak, after = peak.stop(), anonymous_bytes()
    mark("tensors" if side == "bf16" else "prepare")  # without a quantizer, nothing tells where phases end
    ids = torch.arange(PROMPT)[None]
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    mark("first_token")
    seconds, cpu_seconds = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for (_, *started), (name, *ended) in itertools.pairwise(marks):
        seconds[name] += ended[0] - started[0]
        cpu_seconds[name] += ended[1] - started[1]
    backends = {getattr(module, "backend", None) for module in model.modules()} - {None}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "backends": sorted(backends),
                      "held_bytes": after - before, "peak_above_held_bytes": peak - after}))  # fmt: skip


def drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Seconds to read the weight files of a folder."""
    buffer, started = bytearray(2**24), time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started


def sample(side: str, folder: Path, backend: str | None) -> dict:
    command = [sys.executable, __file__, "--once", side, str(folder), *(["--backend", backend] if backend else [])]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def summary(samples: list[dict], reading: float) -> dict:
    """The sample in the middle, and its time as a multiple of reading the file."""
    middle = sorted(samples, key=lambda one: sum(one["seconds"].values()))[len(samples) // 2]
    total = sum(middle["seconds"].values())
    return {
        **middle,
        "total_seconds": total,
        "times_reading": total / reading,
        "times_reading_without_imports": (total - middle["seconds"]["imports"]) / reading,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", nargs=2, metavar=("SIDE", "FOLDER"))
    parser.add_argument("--backend", help="of lowbit (default: the first that can)")
    arguments = parser.parse_args()
    if arguments.once:
        measure_once(*arguments.once, arguments.backend)
        return

    from common import WORK, llama_1b, save

    import lowbit

    dense, quantized = llama_1b(), WORK / "llama-3.2-1b-w4a16"
    if not quantized.exists():
        lowbit.quantize(dense, quantized)
    folders = {"lowbit": quantized, "bf16": dense, "compressed-tensors": quantized}
    runs, reading = {key: [] for key in SAMPLES}, {key: [] for key in SAMPLES}
    for number in range(ROUNDS):
        for side, cache in SAMPLES:
            folder, bring_to_state = folders[side], {"cold": drop_from_cache, "warm": read_once}[cache]
            bring_to_state(folder)
            reading[side, cache].append(read_once(folder))
            bring_to_state(folder)
            runs[side, cache].append(sample(side, folder, arguments.backend))
        # after each round: on a busy machine, all of them can take longer than there is
        result = {"model": "Llama-3.2-1B shapes, random", "rounds": number + 1, "load_average": os.getloadavg()}
        for (side, cache), samples in runs.items():
            seconds = statistics.median(reading[side, cache])
            result[f"{side}, {cache}"] = {"reading_seconds": seconds, **summary(samples, seconds)}
        save("load_time", result)


if __name__ == "__main__":
    main()
