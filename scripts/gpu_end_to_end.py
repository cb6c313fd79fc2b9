"""Whole models on this GPU, through lowbit's loop in CUDA graphs: W4A16-G128 beside bf16, both random, in the shapes of
Llama-3.1-8B. The part of gpu_check.py that needs transformers and the rest of what lowbit needs."""

import torch

from lowbit.bench.random_model import dense_model, quantized_model
from lowbit.bench.repeats import Bench, Side
from lowbit.bench.shapes import config_of
from lowbit.numerics.scheme import Scheme

SHAPES, BATCHES, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = "llama-3.1-8b", (1, 16, 64), 512, 64, 3
TINY = "tiny", (1, 2), 8, 4, 1


def measure(device: torch.device, tiny: bool) -> dict:
    """What `Bench.result` says, and which shapes it is of."""
    shapes, batches, prompt_tokens, new_tokens, rounds = (
        TINY if tiny else (SHAPES, BATCHES, PROMPT_TOKENS, NEW_TOKENS, ROUNDS)
    )
    config, made = config_of(shapes), {"dtype": torch.bfloat16, "device": device}
    bench = Bench(device, batches, prompt_tokens, new_tokens, rounds, loops=("lowbit",))
    scheme = Scheme(4, 128)
    quantized = Side(scheme.name, "random codes", lambda: quantized_model(config, scheme, **made))
    dense = Side("bf16", "random weights", lambda: dense_model(config, **made))
    bench.compare(quantized, [dense])
    return {"shapes": shapes, **bench.result()}


def lines(result: dict) -> list[str]:
    """One for each row, and for what was not measured."""
    shown = [
        f"{result['shapes']} {row['side']:10} batch {row['batch']:3} {row['decode_tokens_per_second']:9.1f} tokens/s "
        f"{row['bandwidth_share']:4.0%} of what copies move, {row['path']}, first token "
        f"{row['first_token_seconds'] * 1e3:.0f} ms" + (f", quantized {row['slower']:.2f}x" if row["slower"] else "")
        for row in result["rows"]
    ]
    return shown + [f"{left['side']} not measured: {left['reason']}" for left in result["left_out"]]
