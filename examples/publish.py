"""Quantize a model, measure what that cost, and publish it on the Hub with a card that says so.

    python examples/publish.py MODEL NAMESPACE/ [--upload]

Shows the card and the files. With --upload they go to a private repository (`hf auth login` first).
"""

import sys

from transformers import AutoTokenizer

import lowbit
from lowbit.eval import evaluate
from lowbit.publish import push
from lowbit.text.datasets import token_stream


def main(model, repo, upload=None, folder="published"):
    lowbit.quantize(model, folder, scheme="W4A16-G128", overwrite=True)

    dataset = "stdlib"  # or wikitext2, a text file, org/name
    stream = token_stream(AutoTokenizer.from_pretrained(folder), dataset, 2000)
    quality = evaluate(lowbit.load(folder), stream, reference=lowbit.load(model), seqlen=512)

    done = push(folder, repo, quality={"dataset": dataset, **quality.to_dict()}, dry_run=upload != "--upload")
    print(done.card)
    for name, size in done.sizes().items():
        print(f"{size:>12,}  {name}")
    print(done.url or f"nothing was uploaded to {done.repo_id}")


if __name__ == "__main__":
    main(*sys.argv[1:])
