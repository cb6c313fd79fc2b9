"""The cache of a batch and the tokens that are in it: what the next prompt shares with them is not run again."""

import torch
from transformers import Cache

from lowbit.generation.steps.cache import crop


class PrefixCache:
    """A static cache of `length` positions for `rows` rows.

    tokens: int64 [2, B, T], ids and mask of the first T positions, whose keys and values it holds; None where those are
        of no use to any other prompt.
    """

    def __init__(self, cache: Cache, rows: int, length: int):
        self.cache, self.rows, self.length = cache, rows, length
        self.tokens: torch.Tensor | None = None

    def fits(self, rows: int, length: int) -> bool:
        return self.rows == rows and self.length >= length

    def filled(self) -> int:
        return int(self.cache.get_seq_length())

    def shared(self, prompt: torch.Tensor) -> int:
        """How many positions of a prompt [2, B, T] need not be run; the last one has to be, for its logits."""
        if self.tokens is None:
            return 0
        count = min(self.tokens.shape[-1], prompt.shape[-1] - 1)
        same = (self.tokens[..., :count] == prompt[..., :count]).all(0).all(0)
        return int(same.cumprod(0).sum())

    def crop(self, tokens: torch.Tensor) -> None:
        """Drop all positions behind these tokens [2, B, T], which are in the cache."""
        crop(self.cache, tokens.shape[-1])
        self.tokens = tokens

    def append(self, tokens: torch.Tensor) -> None:
        """The model was run for these tokens [2, B, T], one after the other or at once."""
        if self.tokens is not None:
            self.tokens = torch.cat([self.tokens, tokens], -1)

    def forget(self) -> None:
        """Nothing is shared from here on, whatever is appended, until the cache is cropped."""
        self.tokens = None
