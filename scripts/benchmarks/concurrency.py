"""Tokens per second of a server with 1, 4 and 16 requests at once: one after the other, in slots, and in the continuous
batching of transformers.

    python scripts/benchmarks/concurrency.py [--layers 16] [--tokens 96] [--prompt 32] [--repeats 2] [--profile FOLDER]

Random weights in the shapes of Llama 3.2 1B, of so many of its layers; what
`lowbit bench --shapes llama-3.2-1b --concurrency 1,4,16` measures, several times, of which the medians are
kept. Run it on an otherwise idle machine; it writes results/concurrency.json. --profile writes no result, but where the
time of 16 requests went, by cProfile in all threads: a table for each way, by the function's own time.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import threading
from pathlib import Path

from common import save

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from lowbit.bench.contestants import Setting, Shapes  # noqa: E402
from lowbit.hf.head import AUTO  # noqa: E402
from lowbit.numerics.scheme import Scheme  # noqa: E402
from lowbit.server.concurrency import Rate, measure  # noqa: E402

SHAPES, REQUESTS = "llama-3.2-1b", (1, 4, 16)


def profiled(model, prompt: int, tokens: int, folder: Path) -> None:
    """One profile for each thread that makes answers, of whatever runs in it."""
    folder.mkdir(parents=True, exist_ok=True)
    run = threading.Thread.run

    def run_profiled(thread) -> None:
        profile = cProfile.Profile()
        try:
            profile.runcall(run, thread)
        finally:
            with open(folder / f"{thread.name}-{thread.native_id}.txt", "w", encoding="utf-8") as file:
                pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(60)

    threading.Thread.run = run_profiled
    try:
        measure(model, (16,), prompt, tokens)
    finally:
        threading.Thread.run = run


def medians(runs: list[list[Rate]]) -> list[dict]:
    rows = []
    for rates in zip(*runs, strict=True):
        speeds = [rate.tokens_per_second for rate in rates]
        row = {"how": rates[0].how, "requests": rates[0].requests, "spread": [min(speeds), max(speeds)]}
        rows.append({**row, "tokens_per_second": statistics.median(speeds)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", type=Path)
    for name, default in {"tokens": 96, "prompt": 32, "layers": 16, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    side = Shapes(SHAPES, chosen.layers, Scheme.parse("W4A16-G128"), Setting(Path(), lm_head=AUTO)).subject()
    model = side.load()
    model.generation_config.eos_token_id = None
    if chosen.profile:
        profiled(model, chosen.prompt, chosen.tokens, chosen.profile)
        return
    runs = [measure(model, REQUESTS, chosen.prompt, chosen.tokens) for _ in range(chosen.repeats)]
    save(
        "concurrency",
        {
            "shapes": SHAPES, "layers": chosen.layers, "weights": side.origin, "prompt_tokens": chosen.prompt,
            "new_tokens": chosen.tokens, "repeats": chosen.repeats, "rates": medians([rates for rates, _ in runs]),
            "left_out": runs[0][1],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
