"""Options that say how tokens are chosen, and what generates them."""

from dataclasses import dataclass
from typing import Any

from lowbit.options.keywords import option


@dataclass(frozen=True)
class TokenOptions:
    """How tokens are chosen, and how many."""

    max_new_tokens: int = option(128, "Tokens to generate at most.", least=1)
    temperature: float = option(0.0, "0 is greedy; higher is more random.", least=0.0)
    top_k: int = option(0, "Sample from so many most likely tokens; 0 for all.", least=0)
    top_p: float = option(
        1.0, "Sample from the most likely tokens that make up this probability.", least=0.01, most=1.0
    )
    min_p: float = option(0.0, "Leave out tokens less likely than this share of the likeliest.", least=0.0, most=1.0)
    repetition_penalty: float = option(1.0, "Above 1: tokens that were there already become less likely.", least=0.01)
    seed: int | None = option(None, "Makes sampling repeatable.", least=0, most=2**63 - 1)


@dataclass(frozen=True)
class SamplingOptions(TokenOptions):
    """How tokens are chosen, and until when."""

    stop: list[str] | None = option(None, "End before this text; may be repeated.", flags=("--stop",))


@dataclass(frozen=True)
class SessionOptions:
    """What generates beside a loaded model, and what it keeps."""

    kv_cache: str = option(
        "full", "Keys and values in the dtype of the model (full), or in 8 bits (int8): half of the memory."
    )
    compile: bool | None = option(None, "torch.compile the decoding step.", flags=("--compile/--no-compile",))
    assistant: Any = option(
        None,
        "Drafts tokens that MODEL then checks: a cheaper one with the same tokens.",
        typed=str | None, metavar="MODEL",
    )  # fmt: skip
    prompt_lookup: int | None = option(None, "Draft so many tokens from what followed the last ones before.", least=1)
