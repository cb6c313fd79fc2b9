"""Perplexity of a model, and how far its next-token distributions are from those of a reference.

Windows of `seqlen` tokens that do not overlap, each started with the tokenizer's BOS token where it uses one: the
convention of published perplexities. KL(reference || model) in nats per token, as llama.cpp reports it: the cheapest
metric that still separates good 4-bit models, which perplexity no longer does.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from lowbit.errors import InputError
from lowbit.hf import check_vocabulary


@dataclass(frozen=True)
class Quality:
    """Perplexity; with a reference its perplexity, mean and 99th percentile KL in nats, top-1 agreement in [0, 1]."""

    perplexity: float
    tokens: int
    seqlen: int
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)


def starts_with_bos(tokenizer) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def windows(stream: torch.Tensor, seqlen: int, bos: int | None) -> list[torch.Tensor]:
    """Consecutive [1, <= seqlen] pieces; each predicts all of its tokens but the first (with BOS: all of its own)."""
    own = seqlen - (bos is not None)
    pieces = [piece for piece in stream.split(own) if len(piece) + (bos is not None) >= 2]
    if bos is not None:
        pieces = [torch.cat([torch.tensor([bos]), piece]) for piece in pieces]
    return [piece.unsqueeze(0) for piece in pieces]


@torch.inference_mode()
def evaluate(
    model,
    stream: torch.Tensor,
    *,
    reference=None,
    seqlen: int = 2048,
    bos: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """stream: int64 [T] token ids. reference: a model with the same vocabulary. bos: token id to start windows with.

    Raises InputError if there are too few tokens or the vocabularies differ.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    seqlen = min(seqlen, limit or seqlen)
    pieces = windows(stream, seqlen, bos)
    if seqlen < 2 or not pieces:
        raise InputError(f"{len(stream)} tokens are too few to evaluate at seqlen {seqlen}: pass a longer text")
    check_vocabulary(model, stream)
    loss = reference_loss = agreements = 0.0
    divergences, count = [], 0
    for index, piece in enumerate(pieces):
        targets = piece[0, 1:]
        log_probs = _log_probs(model, piece)
        loss -= _picked(log_probs, targets)
        count += len(targets)
        if reference is not None:
            expected = _log_probs(reference, piece)
            if expected.shape != log_probs.shape:
                raise InputError(
                    f"the reference has {expected.shape[1]} tokens in its vocabulary, the model {log_probs.shape[1]}"
                )
            reference_loss -= _picked(expected, targets)
            divergences.append((expected.exp() * (expected - log_probs)).sum(-1))
            agreements += float((expected.argmax(-1) == log_probs.argmax(-1)).sum())
        on_window(index + 1, len(pieces))
    if not math.isfinite(loss + reference_loss):
        raise InputError(
            f"the {'model' if not math.isfinite(loss) else 'reference'} gives NaN or infinite logits: "
            "its weights are damaged or its dtype overflows (try bfloat16)"
        )
    if reference is None:
        return Quality(_perplexity(loss, count), count, seqlen)
    divergence = torch.cat(divergences).double()
    # the 99th percentile by sorting: torch.quantile refuses more than 16M values
    p99 = divergence.sort().values[min(len(divergence) - 1, math.ceil(0.99 * len(divergence)) - 1)]
    return Quality(
        _perplexity(loss, count),
        count,
        seqlen,
        _perplexity(reference_loss, count),
        float(divergence.mean()),
        float(p99),
        agreements / count,
    )


def _log_probs(model, piece: torch.Tensor) -> torch.Tensor:
    """float32 [T - 1, vocabulary] on the CPU or the model's device."""
    logits = model(input_ids=piece.to(model.device), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _picked(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    return float(log_probs.gather(1, targets.to(log_probs.device).unsqueeze(1)).double().sum())


def _perplexity(loss: float, count: int) -> float:
    return math.exp(min(loss / count, 700.0))
