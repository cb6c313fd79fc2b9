"""Tokens per second of a server with 1, 4 and 16 requests at once, one after the other and with continuous batching.

    python scripts/benchmarks/concurrency.py [MODEL] [--tokens 32] [--prompt 32] [--layers 4] [--profile FOLDER]

Without MODEL: random weights in the shapes of a 1B Llama (hidden 2048, MLP 8192), of so many layers. It is what
`lowbit bench --concurrency 1,4,16` measures, as one JSON object a line. Run it on an otherwise idle machine; it ends
after a minute or two. --profile writes where the time of 16 requests went, by cProfile in all threads: a table for each
way, by the function's own time.
"""

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import lowbit  # noqa: E402
from lowbit.server.concurrency import Rate, measure  # noqa: E402


def model_of_1b_shapes(folder: Path, layers: int) -> Path:
    from folders import save_random_llama

    save_random_llama(folder / "dense", 2048, 8192, layers, vocabulary=4096)
    lowbit.quantize(folder / "dense", folder / "packed", scheme="W4A16-G128")
    return folder / "packed"


def profiled(model, prompt: int, tokens: int, folder: Path) -> None:
    """One profile for each thread that makes answers, of whatever runs in it."""
    folder.mkdir(parents=True, exist_ok=True)
    run = threading.Thread.run

    def run_profiled(thread) -> None:
        profile = cProfile.Profile()
        try:
            profile.runcall(run, thread)
        finally:
            with open(folder / f"{thread.name}.txt", "w", encoding="utf-8") as file:
                pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(60)

    threading.Thread.run = run_profiled
    try:
        measure(model, (16,), prompt, tokens)
    finally:
        threading.Thread.run = run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--profile", type=Path)
    for name, default in {"tokens": 32, "prompt": 32, "layers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()

    def show(rate: Rate) -> None:
        print(json.dumps(rate.as_dict()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(chosen.model) if chosen.model else model_of_1b_shapes(Path(folder), chosen.layers)
        model = lowbit.load(path)
        model.generation_config.eos_token_id = None
        if chosen.profile:
            profiled(model, chosen.prompt, chosen.tokens, chosen.profile)
        else:
            measure(model, (1, 4, 16), chosen.prompt, chosen.tokens, show)


if __name__ == "__main__":
    main()
