"""What one call of `Decoder.generate` asks for, checked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lowbit.errors import UsageError
from lowbit.generation.sampling import Sampling


@dataclass(frozen=True)
class TokenSettings:
    """How a step picks tokens and ends rows: another step has to be made, and captured, for others.

    Attributes:
        sampling: How the next token is picked.
        eos: The tokens that end a row.
        pad: The token that follows in a row that has ended.
    """

    sampling: Sampling
    eos: tuple[int, ...]
    pad: int


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `Decoder.generate`.

    Attributes:
        prompt: int64 [2, B, T], token ids and the mask, which is 0 for padding, on the device of the model.
        settings: How tokens are picked and rows end.
        max_new_tokens: Tokens to generate for each row at most, 1 or more.
        prefill_chunk: Prompt positions to run at once, 1 or more; None for all.
        seed: Of what is sampled; None for another one each time.
    """

    prompt: torch.Tensor
    settings: TokenSettings
    max_new_tokens: int
    prefill_chunk: int | None
    seed: int | None

    @property
    def ids(self) -> torch.Tensor:
        return self.prompt[0]

    @property
    def mask(self) -> torch.Tensor:
        return self.prompt[1]

    @property
    def rows(self) -> int:
        return self.prompt.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.prompt.shape[2]

    @property
    def length(self) -> int:
        """Positions of the prompt and of all that may follow it."""
        return self.prompt_length + self.max_new_tokens

    @property
    def chunk(self) -> int:
        return self.prefill_chunk or self.prompt_length


def checked_prompt(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """ids [B, T] and their mask [B, T], by default all ones, as `Request.prompt`. Raises UsageError."""
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.ndim != 2 or not ids.numel() or mask.shape != ids.shape:
        raise UsageError(
            f"input_ids {list(ids.shape)}, attention_mask {list(mask.shape)}: expected [batch, tokens] of both"
        )
    if not bool(mask[:, -1].all()):
        raise UsageError("the attention_mask ends with 0: pad prompts on the left")
    return torch.stack([each.to(model.device, torch.long) for each in (ids, mask)])


def token_settings(model: PreTrainedModel, sampling: Sampling, eos: int | Sequence[int] | None) -> TokenSettings:
    """eos: by default that of the model's generation_config, () for none."""
    config = model.generation_config
    eos = config.eos_token_id if eos is None else eos
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    return TokenSettings(sampling, ends, pad)
