"""Generation with a static cache: the prompt in chunks, then one step after the other with no Python between kernels.

Models that have no static cache run in `model.generate`, with the same parameters.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import has_offloaded_params

from lowbit.backends import native
from lowbit.errors import InputError, UsageError, first_line
from lowbit.generation.answer import Answer
from lowbit.generation.cache import crop, filled_cache, room, static_cache, unusable
from lowbit.generation.draft import Draft, Tally
from lowbit.generation.fallback import Listener, Refusal, model_generate, needs_trial, refuse, say_once
from lowbit.generation.graph import CudaGraphs, Direct, Pipeline
from lowbit.generation.kv_int8 import in_int8
from lowbit.generation.positions import PositionTables
from lowbit.generation.recording import Recordings
from lowbit.generation.sampling import Sampling
from lowbit.generation.stats import Stats, Stopwatch
from lowbit.generation.step import Step
from lowbit.generation.trial import difference
from lowbit.upstream import MissingNameError

# What a model raises that does not get along with a static cache
_CACHE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Result:
    """tokens [B, N]: what was generated, with the padding token after the end of a row. lengths [B]: tokens of each
    row, its end token among them."""

    tokens: torch.Tensor
    lengths: list[int]
    stats: Stats


def generate(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    make_cache: Callable | None = None,
    compile: bool | None = None,
    graphs=None,
    **options,
) -> Result:
    """What `Decoder(model, ...).generate(input_ids, attention_mask, **options)` gives, for one call."""
    decoder = Decoder(model, make_cache=make_cache, compile=compile, graphs=graphs)
    return decoder.generate(input_ids, attention_mask, **options)


class Decoder:
    """Generates with one model; keeps its cache and the captured step from call to call.

    make_cache(model, batch, length) -> a transformers Cache of `length` positions whose layers keep their length in a
    tensor `cumulative_length` and change nothing else than tensors in a step; by default one of those in `cache`.
    compile: torch.compile the step; by default it is not.
    graphs: where steps run (see `graph` and `recording`); by default in CUDA graphs on CUDA, recorded on CPUs that have
        a C compiler, called elsewhere.
    int8_cache: keys and values are kept in 8 bits (see `kv_int8`).
    draft: who proposes tokens; then `model.generate` runs, for one row, with a cache of its own kind.
    """

    def __init__(
        self,
        model,
        *,
        make_cache: Callable | None = None,
        compile: bool | None = None,
        graphs=None,
        int8_cache: bool = False,
        draft: Draft | None = None,
    ):
        if draft is not None:
            if int8_cache or compile or make_cache is not None:
                raise UsageError("drafts go with transformers' own cache and step: no int8 cache, no compiling")
            draft.check(model)
        self.model, self.compile, self.int8_cache, self.draft = model, bool(compile), int8_cache, draft
        self.graphs = graphs or _graphs(model, self.compile)
        called = isinstance(self.graphs, Direct | Recordings) and not compile
        self.cache_asked = make_cache is not None
        self.make_cache = make_cache or (filled_cache if called else static_cache)
        self.refusal = refuse(model) if draft is None else Refusal(str(draft), by_nature=True)
        self.tables: PositionTables | None = None  # seen in the first prompt
        self.step: Step | None = None
        self.replay: Callable[[], None] | None = None
        self.path: str | None = None  # of `replay`, and why it is not the fastest
        self.why: str | None = None
        self.held: torch.Tensor | None = None  # ids and mask [2, B, T] whose keys and values the cache holds
        self.held_whole = False  # those keys are encoded for the length of their own prompt
        self.stats = Stats(0, 0)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        prefill_chunk: int | None = 1024,
        on_token: Callable[[list[int]], bool | None] | None = None,
    ) -> Result:
        """Continue input_ids [B, T], left-padded where attention_mask [B, T] is 0, by at most max_new_tokens.

        eos_token_id: what ends a row; by default as the model's generation_config says, () for nothing.
        prefill_chunk: prompt positions that are run at once; None for all, as where `model.generate` runs.
        on_token: called with the B tokens of each step; True ends the generation.
        The cache keeps what it holds: the next prompt is run from where it differs. `stats` are of the last run, of
        one too that an exception has ended. Raises UsageError, and InputError if the logits are no numbers.
        """
        if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise UsageError("max_new_tokens and prefill_chunk are 1 or more")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        ids, mask = self._prompt(input_ids, attention_mask)
        if self.draft is not None and len(ids) > 1:
            raise UsageError(f"drafts are checked for one prompt at a time: got {len(ids)}")
        eos, pad = self._ends(eos_token_id)
        answer = Answer(len(ids), eos, on_token)
        run = _Run(ids, mask, max_new_tokens, seed, answer)
        try:
            if self.refusal is None and self._start(run, sampling, eos, pad, prefill_chunk):
                self._decode(run)
            else:
                self._fall_back(run, sampling, eos, pad)
        finally:
            refusal = self.refusal or run.refusal
            path, why = (self.path, self.why) if refusal is None else ("model.generate", refusal.reason)
            self.stats = run.stats(path or self.graphs.path, why)
        return Result(answer.tokens(), answer.lengths, self.stats)

    def forget(self) -> None:
        """The next prompt is run from its start, whatever the cache holds."""
        self.held = None

    def _prompt(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones_like(ids) if mask is None else mask
        if ids.ndim != 2 or not ids.numel() or mask.shape != ids.shape:
            raise UsageError(
                f"input_ids {list(ids.shape)}, attention_mask {list(mask.shape)}: expected [batch, tokens] of both"
            )
        if not bool(mask[:, -1].all()):
            raise UsageError("the attention_mask ends with 0: pad prompts on the left")
        return ids.to(self.model.device, torch.long), mask.to(self.model.device, torch.long)

    def _ends(self, eos: int | list[int] | None) -> tuple[tuple[int, ...], int]:
        config = self.model.generation_config
        eos = config.eos_token_id if eos is None else eos
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return eos, config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0

    def _start(self, run: "_Run", sampling: Sampling, eos: tuple[int, ...], pad: int, chunk: int | None) -> bool:
        """Run the prompt, as far as the cache does not hold it, and send off the first token. False where the model
        turns out to have no use for such a cache, or not for so many tokens."""
        known, logits = self.tables is not None, None
        try:
            self._make_step(run, sampling, eos, pad)
            if self.refusal is None and not known:
                logits = self._learn(run, chunk)
            if self.refusal is None:
                run.refusal = self._length_refusal(run)
            if self.refusal is None and run.refusal is None:
                self._prefill(run, chunk, logits)
        except torch.OutOfMemoryError:
            raise
        except MissingNameError as error:
            self.refusal = Refusal(str(error))
        except _CACHE_ERRORS as error:
            if known:
                raise
            self.refusal = Refusal(f"a static cache does not work for it: {first_line(error)}")
        return self.refusal is None and run.refusal is None

    def _learn(self, run: "_Run", chunk: int | None) -> torch.Tensor | None:
        """Run the first chunk of the first prompt; the logits after it. Only running a model tells whether it fills the
        cache, and which of its modules encode positions."""
        step, tables, end = self.step, PositionTables(), min(chunk or run.ids.shape[1], run.ids.shape[1])
        if needs_trial(self.model) and (why := self._try_out()):
            self.refusal = Refusal(why, by_nature=True)
            return None
        step.begin(run.ids, run.mask, run.seed)
        with tables.watching(self.model):
            logits = step.prefill(0, end)
        if int(step.cache.get_seq_length()) != end:
            self.refusal = Refusal("its forward does not fill the cache that it is given", by_nature=True)
        self.tables, self.held = tables, torch.stack([run.ids, run.mask])[..., :end]
        return logits

    def _try_out(self) -> str | None:
        """Why a model that says nothing of static caches does not run with one, None if it does."""
        if any(getattr(layer, "is_sliding", False) for layer in self.step.cache.layers):
            return "nothing says that it masks what a static cache keeps beyond its window"
        length = room(1)
        cache = self.make_cache(self.model, 2, length)
        return difference(self.model, Step(self.model, cache, 2, length, Sampling(), (), pad=0))

    def _length_refusal(self, run: "_Run") -> Refusal | None:
        """Where positions are encoded by the length of the sequence, the prompt is run as `model.generate` does: anew
        and at once. A run in which the encoding of the prompt would change is left to it: a model may start over."""
        prompt, end = run.ids.shape[1], run.ids.shape[1] + run.most
        run.whole = not self.tables.same(2, end)
        if run.whole and not self.tables.same(prompt, end):
            return Refusal(f"its encoding of positions changes between {prompt} and {end} tokens")
        return None

    def _make_step(self, run: "_Run", sampling: Sampling, eos: tuple[int, ...], pad: int) -> None:
        batch, needed, old = len(run.ids), run.ids.shape[1] + run.most, self.step
        if old is not None and len(old.tokens) != batch:
            old = None
        if old is not None and old.length >= needed:
            if old.settings == (sampling, eos, pad):
                return
            cache, length = old.cache, old.length
        else:
            length = room(needed, old.length if old is not None else 0)
            self.step = self.replay = self.held = old = None  # frees the old cache before there is a new one
            cache = self.make_cache(self.model, batch, length)
            cache = in_int8(cache) if self.int8_cache else cache
            why = unusable(cache)
            if why is not None:
                self.refusal = Refusal(why, by_nature=not self.cache_asked)
                return
        self.step, self.replay = Step(self.model, cache, batch, length, sampling, eos, pad), None

    def _prefill(self, run: "_Run", chunk: int | None, logits: torch.Tensor | None) -> None:
        """Run what the cache does not hold of the prompt. logits: those after what it holds, if they are known."""
        step, prompt = self.step, torch.stack([run.ids, run.mask])
        length = prompt.shape[-1]
        start = 0 if logits is None else self.held.shape[-1]
        if logits is None or (run.whole and start < length):
            start = 0 if run.whole or self.held_whole else self._shared(prompt)
            run.reused_tokens = int(run.mask[:, :start].sum())
            crop(step.cache, start)
            step.begin(run.ids, run.mask, run.seed)
            self.held = prompt[..., :start]
        self.held_whole = run.whole
        while start < length:
            end = length if run.whole else min(start + (chunk or length), length)
            logits = step.prefill(start, end)
            self.held, start = prompt[..., :end], end
        step.first(logits)

    def _shared(self, prompt: torch.Tensor) -> int:
        """How many positions of a prompt [2, B, T] the cache holds; not the last one, whose logits are wanted."""
        if self.held is None or self.held.shape[1] != prompt.shape[1]:
            return 0
        count = min(self.held.shape[-1], prompt.shape[-1] - 1)
        same = (self.held[..., :count] == prompt[..., :count]).all(0).all(0)
        return int(same.cumprod(0).sum())

    def _decode(self, run: "_Run") -> None:
        answer, tokens = run.answer, Pipeline(self.graphs)
        tokens.send(self.step.tokens)
        try:
            if self._hand_out(run, tokens, last=run.most == 1 or self.replay is None):
                return
            self._make_replay(run)
            for number in range(2, run.most + 1):
                self.replay()
                tokens.send(self.step.tokens)
                if self._hand_out(run, tokens, last=number == run.most):
                    return
        finally:
            fed = answer.tokens()[:, :-1].to(run.ids.device)
            self.held = torch.cat([self.held, torch.stack([fed, torch.ones_like(fed)])], -1)
            run.decode_seconds += run.watch.lap()

    def _hand_out(self, run: "_Run", tokens: Pipeline, last: bool) -> bool:
        for step in tokens.receive(last):
            if not run.answer.steps:
                run.prefill_seconds = run.watch.lap()
            if run.answer.take(step):
                return True
        return False

    def _make_replay(self, run: "_Run") -> None:
        """Compile and capture the step, where that is wanted and was not done before."""
        if self.replay is not None:
            return
        step, restore = self.step, self.step.restoring()
        self.path, self.why = self.graphs.path, None
        if self.compile:
            self._compile(step)
        try:
            self.replay = self.graphs.capture(step, step.generator)
        except RuntimeError as error:
            self.replay, self.path, self.why = step, Direct.path, f"the step cannot be captured: {first_line(error)}"
            say_once(f"{type(self.model).__name__} runs in the {self.path}: {self.why}", logging.WARNING)
        restore()
        run.setup_seconds = run.watch.lap()

    def _compile(self, step: Step) -> None:
        step.forward = torch.compile(self.model.forward)
        try:
            step()  # compiles, and is undone
            self.path = f"compiled {self.path}"
        except RuntimeError as error:
            step.forward = self.model
            self.why = f"torch.compile fails: {first_line(error)}"
            say_once(f"{type(self.model).__name__} is not compiled: {self.why}", logging.WARNING)

    def _fall_back(self, run: "_Run", sampling: Sampling, eos: tuple[int, ...], pad: int) -> None:
        refusal = self.refusal or run.refusal
        if self.int8_cache:
            raise InputError(
                f"keys and values in int8 need a cache that this model does not run with: {refusal.reason}"
            )
        name, without = type(self.model).__name__, ", without the cache that was asked for" if self.cache_asked else ""
        level = logging.INFO if refusal.by_nature and not self.cache_asked else logging.WARNING
        say_once(f"{name} runs in model.generate{without}: {refusal.reason}", level)

        def on_token(tokens: list[int]) -> bool:
            if not run.answer.steps:
                run.prefill_seconds = run.watch.lap()
            return run.answer.take(tokens)

        options = {"max_new_tokens": run.most, "sampling": sampling, "eos": eos, "pad": pad, "seed": run.seed}
        try:
            if self.draft is None:
                model_generate(self.model, run.ids, run.mask, listener=Listener(on_token), **options)
            else:
                self.draft.generate(self.model, run.ids, run.mask, on_token=on_token, tally=run.tally, **options)
        finally:
            run.decode_seconds = run.watch.lap()


def _graphs(model, compiled: bool):
    if any(map(has_offloaded_params, model.modules())):
        return Direct()  # what is repeated keeps its tensors: the weights would all stay
    if model.device.type == "cuda":
        return CudaGraphs(model.device)
    if model.device.type != "cpu" or compiled:
        return Direct()
    if why := native.available():
        say_once(f"{type(model).__name__} runs in the {Direct.path}, not recorded: {why}", logging.WARNING)
        return Direct()
    return Recordings()


@dataclass
class _Run:
    """What one call of `generate` is about: ids and mask [B, T], `most` new tokens; and its figures."""

    ids: torch.Tensor
    mask: torch.Tensor
    most: int
    seed: int | None
    answer: Answer
    whole: bool = False  # the prompt has to be run at once
    refusal: Refusal | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    setup_seconds: float = 0.0
    decode_seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def stats(self, path: str, why: str | None) -> Stats:
        return Stats(
            prompt_tokens=int(self.mask.sum()),
            new_tokens=sum(self.answer.lengths),
            reused_tokens=self.reused_tokens,
            prefill_seconds=self.prefill_seconds,
            setup_seconds=self.setup_seconds,
            decode_seconds=self.decode_seconds,
            path=path,
            why=why,
            first_tokens=len(self.ids) + self.tally.early,
            drafted_tokens=self.tally.drafted,
            accepted_tokens=self.tally.accepted,
        )
