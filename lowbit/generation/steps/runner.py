"""The step of a batch: made with its cache for a length and settings, compiled, captured, and how it is repeated."""

import logging
from collections.abc import Callable

import torch
from accelerate.utils import has_offloaded_params
from transformers import Cache, PreTrainedModel

from lowbit.backends import native
from lowbit.errors import first_line
from lowbit.generation.kv_int8 import in_int8
from lowbit.generation.request import Request
from lowbit.generation.steps.cache import filled_cache, room, static_cache, unusable
from lowbit.generation.steps.graph import CudaGraphs, Eager, Graphs
from lowbit.generation.steps.notices import say_once
from lowbit.generation.steps.prefix import PrefixCache
from lowbit.generation.steps.recording import Recordings
from lowbit.generation.steps.step import Step
from lowbit.parallel import ranks_of

MakeCache = Callable[[PreTrainedModel, int, int], Cache]


class StepRunner:
    """Keeps one cache and one step, from run to run for as long as they fit.

    path: how the step that was captured last is repeated. why: what kept a faster way from it, if anything did.
    replay: makes that step; None before it is captured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        make_cache: MakeCache | None,
        compile: bool,
        graphs: Graphs | None,
        int8_cache: bool,
    ):
        self.model, self.compile, self.int8_cache = model, compile, int8_cache
        self.graphs = graphs or _default_graphs(model, compile)
        counts_in_python = isinstance(self.graphs, Eager | Recordings) and not compile
        self.cache_given = make_cache is not None
        self.make_cache: MakeCache = make_cache or (filled_cache if counts_in_python else static_cache)
        self.replay: Callable[[], None] | None = None
        self.path: str = self.graphs.path
        self.why: str | None = None
        self._cache: PrefixCache | None = None
        self._step: Step | None = None

    @property
    def cache(self) -> PrefixCache:
        assert self._cache is not None, "prepare makes it"
        return self._cache

    @property
    def step(self) -> Step:
        assert self._step is not None, "prepare makes it"
        return self._step

    def prepare(self, request: Request) -> str | None:
        """Have a cache and a step that fit a request. Returns why the caches of the model cannot be used, None if they
        can; raises what the model does when it makes one."""
        if self._cache is None or not self._cache.fits(request.rows, request.length):
            reason = self._allocate(request.rows, request.length)
            if reason is not None:
                return reason
        if self._step is None or self._step.settings != request.settings:
            cache = self.cache
            self._step = Step(self.model, cache.cache, cache.rows, cache.length, request.settings)
            self.replay = None
        return None

    def _allocate(self, rows: int, needed: int) -> str | None:
        before = self._cache.length if self._cache is not None and self._cache.rows == rows else 0
        self._cache = self._step = self.replay = None  # frees the old cache before there is a new one
        length = room(needed, before)
        cache = self.make_cache(self.model, rows, length)
        cache = in_int8(cache) if self.int8_cache else cache
        if (reason := unusable(cache)) is None:
            self._cache = PrefixCache(cache, rows, length)
        return reason

    def forget(self) -> None:
        """The next prompt is run from its start, whatever the cache holds."""
        if self._cache is not None:
            self._cache.forget()

    def restart(self, request: Request, start: int) -> None:
        """Start over with a prompt of which the first `start` positions stay in the cache."""
        self.cache.crop(request.prompt[..., :start])
        self.step.begin(request.ids, request.mask, request.seed)

    def prefill(self, request: Request, start: int, end: int) -> torch.Tensor:
        """Run prompt positions [start, end). Returns the logits [B, V] after the last of them, in float32."""
        logits = self.step.prefill(start, end)
        self.cache.append(request.prompt[..., start:end])
        return logits

    def capture(self) -> Callable[[], None]:
        """Compile the step, where that is wanted, and capture it; steps made for it are undone. Returns `replay`."""
        step, restore = self.step, self.step.restoring()
        self.path, self.why = self.graphs.path, None
        if self.compile:
            self._compile(step)
        try:
            self.replay = self.graphs.capture(step, step.generator)
        except RuntimeError as error:
            self.replay, self.path, self.why = step, Eager.path, f"the step cannot be captured: {first_line(error)}"
            say_once(f"{type(self.model).__name__} runs in the {self.path}: {self.why}", logging.WARNING)
        restore()
        return self.replay

    def _compile(self, step: Step) -> None:
        step.forward = torch.compile(self.model.forward)
        try:
            step()  # compiles, and is undone
            self.path = f"compiled {self.path}"
        except RuntimeError as error:
            step.forward = self.model
            self.why = f"torch.compile fails: {first_line(error)}"
            say_once(f"{type(self.model).__name__} is not compiled: {self.why}", logging.WARNING)


def _default_graphs(model: PreTrainedModel, compiled: bool) -> Graphs:
    if ranks_of(model) is not None:
        return Eager()  # what is recorded or captured waits for no other process
    if any(map(has_offloaded_params, model.modules())):
        return Eager()  # what is repeated keeps its tensors: the weights would all stay
    if model.device.type == "cuda":
        return CudaGraphs(model.device)
    if model.device.type != "cpu" or compiled:
        return Eager()
    if why := native.available():
        say_once(f"{type(model).__name__} runs in the {Eager.path}, not recorded: {why}", logging.WARNING)
        return Eager()
    return Recordings()
