"""How much memory a calibrated run takes: measured, and predicted from shapes before it begins."""

from dataclasses import dataclass

import torch

from lowbit.quantization.plan import Step
from lowbit.system.memory import available_memory, peak_memory

# float32 matrices the size of the weight that a solver holds at a time, and float64 matrices the size of its Hessian
_WEIGHTS_AT_A_TIME, _HESSIANS_AT_A_TIME = 6, 5


def expected_peak(steps: list[list[Step]], streams: int, itemsize: int, hessians: bool) -> int:
    """Bytes: what is held now, the largest layer as each stream has it and its stored form, and a solver at work on its
    largest matrix; without what `held_between_stages` says. itemsize: of the dtype that layers compute in. hessians:
    whether the solver has them."""

    def layer(group: list[Step]) -> int:
        weights = sum(step.source.numel for step in group)
        inputs = max((step.site.in_features for step in group), default=0)
        largest = max((step.site.in_features * step.site.out_features for step in group), default=0)
        solver = 4 * _WEIGHTS_AT_A_TIME * largest + 8 * _HESSIANS_AT_A_TIME * inputs**2 * hessians
        return (streams * itemsize + 2) * weights + solver

    return peak_memory() + max(map(layer, steps), default=0)


def held_between_stages(steps: list[list[Step]], tokens: int, streams: int, itemsize: int, hidden_size: int) -> int:
    """Bytes that the open forward passes of all streams hold at the widest point of a layer: its input, the
    residual, and what the widest linear is called with."""
    widest = max((step.site.in_features for group in steps for step in group), default=0)
    return streams * tokens * (widest + 2 * hidden_size) * itemsize


@dataclass(frozen=True)
class ExpectedMemory:
    """peak: bytes that a run will take. keep: whether forward passes can stay open between the stages of a layer."""

    peak: int
    keep: bool


def expected_memory(
    steps: list[list[Step]],
    batches: list[torch.Tensor],
    streams: int,
    dtype: torch.dtype,
    hidden_size: int,
    hessians: bool,
    allowed: int | None,
) -> ExpectedMemory:
    """What a run will take, and how it keeps to what it may.

    Args:
        steps: What is quantized in each layer.
        batches: Token ids [B, T] of this process.
        streams: How many models go through the layers.
        dtype: What layers compute in.
        hidden_size: Of the hidden states.
        hessians: Whether the solver has them.
        allowed: Bytes; None: half of what is free besides what is held now.
    """
    peak = expected_peak(steps, streams, dtype.itemsize, hessians)
    tokens = sum(batch.numel() for batch in batches)
    held = held_between_stages(steps, tokens, streams, dtype.itemsize, hidden_size)
    keep = peak + held <= (allowed or peak_memory() + available_memory() // 2)
    return ExpectedMemory(peak + (held if keep else held // len(batches)), keep)
