"""Tokens per second of a server with 1, 4 and 16 requests at once, one after the other and with continuous batching.

    python scripts/benchmarks/concurrency.py [MODEL] [--tokens 32] [--prompt 32] [--layers 4]

Without MODEL: random weights in the shapes of a 1B Llama (hidden 2048, MLP 8192), of so many layers. Tokens are made
as `lowbit serve` makes them, without HTTP. Run it on an otherwise idle machine; it ends after a minute or two.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from transformers import GenerationConfig  # noqa: E402

import lowbit  # noqa: E402
from lowbit.generation.stream import Session  # noqa: E402
from lowbit.options import BatchingOptions, LimitOptions  # noqa: E402
from lowbit.server.asked import ASKED, Asked  # noqa: E402
from lowbit.server.run import answers_of  # noqa: E402


def model_of_1b_shapes(folder: Path, layers: int) -> Path:
    from folders import save_random_llama

    save_random_llama(folder / "dense", 2048, 8192, layers, vocabulary=4096)
    lowbit.quantize(folder / "dense", folder / "packed", scheme="W4A16-G128")
    return folder / "packed"


class Letters:
    """A tokenizer of no consequence: what is measured is the making of tokens."""

    def decode(self, ids, **options) -> str:
        return "x" * len(ids)

    def __call__(self, text: str, **options) -> dict:
        return {"input_ids": [0] * len(text)}


async def seconds(answers, model, at_once: int, prompt: int, tokens: int) -> float:
    """Of so many requests that come together, each with another prompt."""

    async def ask(number: int) -> None:
        ASKED.set(Asked({"max_new_tokens": tokens, "temperature": 0.0}))
        ids = torch.arange(number, number + prompt).view(1, -1) % 1000 + 1
        config = GenerationConfig(eos_token_id=None)
        queue, _ = answers.generate_streaming(model, None, {"input_ids": ids}, config, str(number))
        while (item := await queue.get()) is not None:
            if not isinstance(item, str):
                raise SystemExit(f"error: {item.msg}")

    start = time.perf_counter()
    await asyncio.gather(*(asyncio.create_task(ask(number * 7)) for number in range(at_once)))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    for name, default in {"tokens": 32, "prompt": 32, "layers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(chosen.model) if chosen.model else model_of_1b_shapes(Path(folder), chosen.layers)
        model = lowbit.load(path)
        model.generation_config.eos_token_id = None
        session, rows = Session(model, Letters()), []
        for name, batching in {
            "one after the other": BatchingOptions(),
            "continuous batching": BatchingOptions(True, cb_num_blocks=64, cb_max_batch_tokens=512),
        }.items():
            answers = answers_of(session, LimitOptions(), batching, prefill_chunk=512)
            asyncio.run(seconds(answers, model, 1, chosen.prompt, 4))  # what is made once
            for at_once in (1, 4, 16):
                took = asyncio.run(seconds(answers, model, at_once, chosen.prompt, chosen.tokens))
                rows.append({"how": name, "at once": at_once, "tokens/s": round(at_once * chosen.tokens / took, 1)})
                print(json.dumps(rows[-1]), flush=True)
            answers.stop()


if __name__ == "__main__":
    main()
