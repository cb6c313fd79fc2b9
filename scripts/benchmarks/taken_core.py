"""Decoding while another process computes without a pause: what is left of it, with and without `FreeCores`.

    python scripts/benchmarks/taken_core.py [--shapes llama-3.2-1b] [--layers 4] [--rounds 3]

Tokens per second of the recorded loop: alone, alone in one thread, and beside one busy process, in as many threads as
there are cores and in as many as `lowbit.system.cores` finds free. They take turns; the median counts.
"""

import argparse
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from common import save

from lowbit.bench.loops import lowbit_loop, prompts
from lowbit.bench.random_model import quantized_model
from lowbit.bench.shapes import config_of
from lowbit.numerics.scheme import HEAD_SCHEME, Scheme
from lowbit.system.cores import FreeCores

PROMPT, NEW = 16, 65


@contextmanager
def busy():
    """A process that computes."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def all_threads():
    return patch.object(FreeCores, "limit", lambda self, threads: threads)


# name -> (threads; None: all, whether another process computes, whether threads stay as many)
CASES = {
    "alone": (None, False, False),
    "alone, one thread": (1, False, False),
    "a core taken, all threads": (None, True, True),
    "a core taken, threads for free cores": (None, True, False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config, most = config_of(options.shapes, options.layers), torch.get_num_threads()
    config.tie_word_embeddings = False
    run = lowbit_loop(quantized_model(config, Scheme(4, 128), dtype=torch.bfloat16, lm_head=HEAD_SCHEME))
    rates = defaultdict(list)
    for number in range(options.rounds + 1):
        for name, (threads, taken, stay) in CASES.items():
            torch.set_num_threads(threads or most)
            with busy() if taken else nullcontext(), all_threads() if stay else nullcontext():
                timing = run(prompts(config.vocab_size, 1, PROMPT, number, "cpu"), NEW)
            if number:  # the first one warms up
                rates[name].append(timing.decode_tokens_per_second)
    rows = [
        {"case": name, "tokens_per_second": statistics.median(found), "spread": [min(found), max(found)]}
        for name, found in rates.items()
    ]
    save("taken_core", {"shapes": options.shapes, "layers": options.layers, "threads": most, "rows": rows})


if __name__ == "__main__":
    main()
