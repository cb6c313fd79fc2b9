"""Generation with a static cache: the prompt in chunks, then one step after the other with no Python between kernels.

Models that have no static cache run in `model.generate`, with the same parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit.errors import UsageError
from lowbit.generation.answer import Answer
from lowbit.generation.draft import Draft
from lowbit.generation.eligibility import Eligibility, Refusal, refuse
from lowbit.generation.fallback import Fallback, generate_plainly
from lowbit.generation.request import Request, checked_prompt, token_settings
from lowbit.generation.sampling import Sampling
from lowbit.generation.shared import check_shared, in_step
from lowbit.generation.stats import Stats
from lowbit.generation.steps.graph import Graphs, Pipeline
from lowbit.generation.steps.runner import MakeCache, StepRunner
from lowbit.layers.inputs import inputs_of_model
from lowbit.options import TokenOptions, takes_options

PREFILL_CHUNK = 1024  # positions of a prompt that are run at once


@dataclass(frozen=True)
class Result:
    """tokens [B, N]: what was generated, with the padding token after the end of a row. lengths [B]: tokens of each
    row, its end token among them."""

    tokens: torch.Tensor
    lengths: list[int]
    stats: Stats


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    make_cache: MakeCache | None = None,
    compile: bool | None = None,
    graphs: Graphs | None = None,
    **options: Any,
) -> Result:
    """Generate once with a model: what `Decoder(model, ...).generate(input_ids, attention_mask, **options)` gives."""
    decoder = Decoder(model, make_cache=make_cache, compile=compile, graphs=graphs)
    return decoder.generate(input_ids, attention_mask, **options)


class Decoder:
    """Generates with one model; keeps its cache and the captured step from call to call.

    Args:
        model: A causal language model of transformers, or one that only its `generate` runs.
        make_cache: (model, batch, length) -> a transformers Cache of `length` positions whose layers keep their length
            in a tensor `cumulative_length` and change nothing else than tensors in a step; by default one of those in
            `steps.cache`.
        compile: torch.compile the step; by default it is not.
        graphs: How steps are repeated (see `steps.graph`); by default in CUDA graphs on CUDA, recorded on CPUs that
            have a C compiler, called elsewhere.
        int8_cache: Keep keys and values in 8 bits (see `kv_int8`).
        draft: Who proposes tokens; then `model.generate` runs, for one row, with a cache of its own kind.

    Raises:
        UsageError: For a draft together with what belongs to the loop.
        InputError: For a draft that cannot be checked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        make_cache: MakeCache | None = None,
        compile: bool | None = None,
        graphs: Graphs | None = None,
        int8_cache: bool = False,
        draft: Draft | None = None,
    ):
        if draft is not None:
            if int8_cache or compile or make_cache is not None:
                raise UsageError("drafts go with transformers' own cache and step: no int8 cache, no compiling")
            draft.check(model)
        check_shared(model, compile=bool(compile), draft=draft)
        self.model, self.draft = model, draft
        self.runner = StepRunner(
            model, make_cache=make_cache, compile=bool(compile), graphs=graphs, int8_cache=int8_cache
        )
        self.eligibility = Eligibility(model, Refusal(str(draft), by_nature=True) if draft else refuse(model))
        self.fallback = Fallback(
            model,
            draft.generate if draft else generate_plainly,
            int8_cache=int8_cache,
            cache_given=make_cache is not None,
        )
        self.stats = Stats(0, 0)

    @takes_options
    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        tokens: TokenOptions,
        eos_token_id: int | Sequence[int] | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
        on_token: Callable[[list[int]], bool | None] | None = None,
    ) -> Result:
        """Continue prompts. The next one is run from where it differs from what is in the cache. `stats` are of the
        last run, of one too that an exception has ended.

        Args:
            input_ids: Integers [B, T].
            attention_mask: [B, T], 0 where a prompt is padded, on the left; by default nowhere.
            eos_token_id: What ends a row; by default as the model's generation_config says, () for nothing.
            prefill_chunk: Prompt positions that are run at once; None for all, as where `model.generate` runs.
            on_token: Called with the B tokens of each step; True ends the generation. Where several processes share
                the model, that of the first one alone is called, and ends it in all of them.

        Raises:
            UsageError: For options and prompts that cannot be.
            InputError: If the logits are no numbers, or nothing runs the model as the decoder was asked to.
        """
        request = self.request(input_ids, attention_mask, tokens, eos_token_id, prefill_chunk)
        seed, on_token = in_step(self.model, tokens.seed, on_token)
        return self._answer(replace(request, seed=seed), Answer(request.rows, request.settings.eos, on_token))

    def request(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tokens: TokenOptions,
        eos_token_id: int | Sequence[int] | None = None,
        prefill_chunk: int | None = PREFILL_CHUNK,
    ) -> Request:
        """What `generate` is asked for, checked. Raises UsageError."""
        if tokens.max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise UsageError("max_new_tokens and prefill_chunk are 1 or more")
        sampling = Sampling(**{each.name: getattr(tokens, each.name) for each in fields(Sampling)})
        prompt = checked_prompt(self.model, input_ids, attention_mask)
        settings = token_settings(self.model, sampling, eos_token_id)
        request = Request(prompt, settings, tokens.max_new_tokens, prefill_chunk, tokens.seed)
        if self.draft is not None and request.rows > 1:
            raise UsageError(f"drafts are checked for one prompt at a time: got {request.rows}")
        return request

    def forget(self) -> None:
        """The next prompt is run from its start, whatever the cache holds."""
        self.runner.forget()

    def _answer(self, request: Request, answer: Answer) -> Result:
        refusal = None
        try:
            refusal = self.start(request, answer)
            if refusal is None:
                self._decode(request, answer)
            else:
                self.fallback.run(request, answer, refusal)
        finally:
            path, why = (self.runner.path, self.runner.why) if refusal is None else (self.fallback.path, refusal.reason)
            self.stats = answer.metrics.stats(request.mask, answer.lengths, path, why, inputs_of_model(self.model))
        return Result(answer.tokens(), answer.lengths, self.stats)

    def start(
        self, request: Request, answer: Answer, on_chunk: Callable[[int], None] = lambda positions: None
    ) -> Refusal | None:
        """Run the prompt, as far as the cache does not hold it, and pick the first token; `on_chunk` is called with the
        positions of each chunk. Returns why the loop does not run the model, or not this request."""
        runner, eligibility = self.runner, self.eligibility
        if eligibility.refusal is not None:
            return eligibility.refusal
        with eligibility.judging():
            unusable = runner.prepare(request)
            if unusable is not None:
                return eligibility.rule_out(unusable, by_nature=not runner.cache_given)
            logits = None if eligibility.has_run else eligibility.observe(runner, request)
            if eligibility.refusal is not None:
                return eligibility.refusal
            at_once = eligibility.encodes_by_length(request)
            if at_once and (refusal := eligibility.length_refusal(request)) is not None:
                return refusal
            self._prefill(request, answer, at_once, logits, on_chunk)
        return eligibility.refusal

    def _prefill(
        self,
        request: Request,
        answer: Answer,
        at_once: bool,
        logits: torch.Tensor | None,
        on_chunk: Callable[[int], None],
    ) -> None:
        """Run what is not in the cache of the prompt, and pick the first token.

        at_once: the prompt is run anew, as one chunk. logits: those after its first chunk, if that was just run.
        """
        cache, length = self.runner.cache, request.prompt_length
        chunk = length if at_once else request.chunk
        start = request.chunk  # of what is still to run
        if logits is None or (at_once and start < length):
            start = 0 if at_once else cache.shared(request.prompt)
            answer.metrics.reused_tokens = int(request.mask[:, :start].sum())
            self.runner.restart(request, start)
        if at_once:
            cache.forget()  # no other prompt is encoded as this one
        for begin in range(start, length, chunk):
            end = min(begin + chunk, length)
            logits = self.runner.prefill(request, begin, end)
            on_chunk(end - begin)
        assert logits is not None  # at least the last position was run
        self.runner.step.first(logits)

    def _decode(self, request: Request, answer: Answer) -> None:
        """Hand out the first token, then make one step after the other and hand out what they give."""
        runner, step, tokens = self.runner, self.runner.step, Pipeline(self.runner.graphs)

        def hand_out(last: bool) -> bool:
            return any(answer.take(each) for each in tokens.receive(last))

        tokens.send(step.tokens)
        try:
            # Nothing runs beside the capture: the first token need not wait for it
            if hand_out(last=request.max_new_tokens == 1 or runner.replay is None):
                return
            replay = runner.replay
            if replay is None:
                replay = runner.capture()
                answer.metrics.end_setup()
            for number in range(2, request.max_new_tokens + 1):
                replay()
                tokens.send(step.tokens)
                if hand_out(last=number == request.max_new_tokens):
                    return
        finally:
            fed = answer.tokens()[:, :-1].to(request.prompt.device)  # the last one was not
            runner.cache.append(torch.stack([fed, torch.ones_like(fed)]))
            answer.metrics.end_decode()
