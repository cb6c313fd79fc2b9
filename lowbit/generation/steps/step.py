"""One decoding step on tensors that stay where they are, so that it can be captured once and replayed."""

import inspect
from collections.abc import Callable

import torch
from transformers import Cache, PreTrainedModel

from lowbit.generation.request import TokenSettings
from lowbit.generation.sampling import pick
from lowbit.generation.steps.cache import commit, crop, grows, set_visible
from lowbit.transformers_api import cache_argument


class Step:
    """The state of a batch and what makes the next token of it.

    Static tensors: `tokens` [B] that the last step gave, `inputs` [B, 1] and `positions` [B, 1] that the next one
    takes, `mask` [B, L] of the cache's L positions (0 for padding; causality masks what comes later), `finished` [B],
    and `seen` [B, V] where repetition is penalised.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int, length: int, settings: TokenSettings):
        device = model.device
        self.model, self.cache, self.length, self.settings = model, cache, length, settings
        self.arguments = ForwardArguments(model)
        self.eos = torch.tensor(settings.eos, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.inputs = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.generator = torch.Generator(device)
        self.seen: torch.Tensor | None = None
        self.filled = 0  # positions of the cache
        self.visible: int | None = None  # those that a step sees that is recorded
        self.forward: Callable = model  # the compiled one, where that was asked for

    def begin(self, ids: torch.Tensor, mask: torch.Tensor, seed: int | None) -> None:
        """Start over with prompts [B, T] and their mask [B, T]; the caller crops the cache."""
        self.prompt, self.prompt_positions = ids, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        self.mask.fill_(1)
        self.mask[:, : mask.shape[1]] = mask
        self.filled, self.visible = mask.shape[1], None
        self.finished.fill_(False)
        self.positions.copy_(self.prompt_positions[:, -1:])
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def prefill(self, start: int, end: int) -> torch.Tensor:
        """Run prompt positions [start, end). Returns the logits [B, V] after the last of them, in float32."""
        return self._logits(
            self.model,
            self.prompt[:, start:end],
            self.mask[:, :end],  # transformers takes what lies beyond as masked, and may skip the mask for it
            self.prompt_positions[:, start:end],
            last_only=True,
        )

    def first(self, logits: torch.Tensor) -> None:
        """The first token, from the logits of the prefill."""
        if self.settings.sampling.repetition_penalty != 1:
            self._see_prompt(logits.shape[-1])
        self._take(logits)

    def __call__(self) -> None:
        self._take(self.logits())

    def feed(self, tokens: torch.Tensor) -> None:
        """The tokens [B, 1] that the next step takes."""
        self.inputs.copy_(tokens)
        self.positions += 1

    def logits(self) -> torch.Tensor:
        """[B, V] in float32 after the tokens that were fed last."""
        self.filled += 1
        seen = self.visible or (self.filled if grows(self.cache) else self.length)
        logits = self._logits(self.forward, self.inputs, self.mask[:, :seen], self.positions)
        if self.visible is not None:
            commit(self.cache)
        return logits

    def set_visible(self, visible: int) -> None:
        """See the first `visible` positions in every step to come, until `begin`."""
        self.visible = visible
        set_visible(self.cache, visible)

    def restoring(self) -> Callable[[], None]:
        """A function that undoes the steps that will have been made when it is called."""
        kept = [self.tokens, self.inputs, self.positions, self.finished]
        kept += [self.seen] if self.seen is not None else []
        values, state = [tensor.clone() for tensor in kept], self.generator.get_state()
        prompt_length = self.prompt.shape[1]

        def restore() -> None:
            for tensor, value in zip(kept, values, strict=True):
                tensor.copy_(value)
            self.generator.set_state(state)
            self.filled, self.visible = prompt_length, None
            crop(self.cache, prompt_length)

        return restore

    def _logits(self, forward: Callable, ids, mask, positions, last_only: bool = False) -> torch.Tensor:
        output = forward(**self.arguments(ids, mask, positions, self.cache, last_only))
        return output.logits[:, -1].float()

    def _see_prompt(self, vocabulary: int) -> None:
        if self.seen is None:
            self.seen = torch.zeros(len(self.prompt), vocabulary, dtype=torch.bool, device=self.prompt.device)
        self.seen.fill_(False)
        for row, ids in enumerate(self.prompt):
            known = ids[(self.mask[row, : len(ids)] != 0) & (ids < vocabulary)]
            self.seen[row, known] = True

    def _take(self, logits: torch.Tensor) -> None:
        tokens = pick(logits, self.settings.sampling, self.seen, self.generator)
        tokens = tokens.masked_fill(self.finished, self.settings.pad)
        self.finished |= (tokens[:, None] == self.eos).any(-1)
        self.tokens.copy_(tokens)
        self.feed(tokens[:, None].clamp_min(0))
        if self.seen is not None:
            self.seen.scatter_(1, self.inputs, True)


class ForwardArguments:
    """Keywords for the forward of a model, under the names that it takes them by.

    Positions are left out where the model's own generation leaves them out: such a model counts for itself, from an
    offset or in several dimensions.
    """

    def __init__(self, model):
        names = inspect.signature(model.forward).parameters
        self.cache = cache_argument(model)
        self.keeps_logits = "logits_to_keep" in names
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        prepared = model.prepare_inputs_for_generation(
            token, attention_mask=torch.ones_like(token), position_ids=token, use_cache=True, is_first_iteration=True
        )
        # a forward that names no cache hands all that it is given to another one
        takes_positions = "position_ids" in names or self.cache not in names
        self.positions = takes_positions and prepared.get("position_ids") is not None

    def __call__(self, ids, mask, positions, cache, last_only: bool) -> dict:
        """ids, positions [B, T], mask [B, L]. last_only: the logits of the last position are enough."""
        given = {"input_ids": ids, "attention_mask": mask, self.cache: cache, "use_cache": True}
        if self.positions:
            given["position_ids"] = positions
        if last_only and self.keeps_logits:
            given["logits_to_keep"] = 1
        return given
