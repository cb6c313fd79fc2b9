"""What an output embedding in 8 bits costs beside a dense one: KL divergence, and seconds to make it.

    python scripts/benchmarks/int8_head.py [--model MODEL TEXT] [--tokens N]

KL(all dense || the output embedding in W8A16-G128) of all tokens of TEXT, which is what `lowbit eval --dataset` takes.
"""

import argparse
import time
from pathlib import Path

import torch
from common import save

import lowbit
from lowbit.eval import evaluate
from lowbit.eval.compare import starts_with_bos
from lowbit.folders.locate import resolve
from lowbit.generation.stream import load_tokenizer
from lowbit.numerics.scheme import HEAD_SCHEME
from lowbit.text.datasets import token_stream

WINDOW = 512


def measure(model: str, text: str, count: int) -> dict:
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    stream = token_stream(tokenizer, text, count)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    seconds, models = [], []
    for head in (None, HEAD_SCHEME):
        started = time.perf_counter()
        models.append(lowbit.load(folder, dtype=torch.bfloat16, lm_head=head, exact=True))
        seconds.append(time.perf_counter() - started)
    dense, quantized = models
    found = evaluate(quantized, stream, reference=dense, seqlen=WINDOW, bos=bos)
    head = quantized.get_output_embeddings()
    row = {"model": Path(model).name, "scheme": head.scheme.name, "shape": [*head.shape], "tokens": found.tokens,
           "kl": found.kl_mean, "kl_p99": found.kl_p99, "top1_agreement": found.top1_agreement,
           "perplexity": [found.reference_perplexity, found.perplexity],
           "seconds": seconds[1] - seconds[0]}  # fmt: skip
    print(row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs=2, action="append", metavar=("MODEL", "TEXT"), default=None)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    rows = [measure(*given, options.tokens) for given in options.model or [["reference", "stdlib"]]]
    save("int8_head", {"window": WINDOW, "rows": rows})


if __name__ == "__main__":
    main()
