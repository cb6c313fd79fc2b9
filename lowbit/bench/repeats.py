"""Rounds in which the sides of a comparison take turns, so that all of them see the same machine."""

import gc
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lowbit.backends import get_backend
from lowbit.bench.bytes_moved import bytes_per_second, cache_bytes, extra_memory, model_bytes, step_bytes
from lowbit.bench.loops import LOOPS, Run, Timing, prompts
from lowbit.errors import InputError, first_line
from lowbit.layers.experts import expert_weights
from lowbit.layers.linear import LowbitLinear
from lowbit.system.memory import available_memory


@dataclass(frozen=True)
class Side:
    """A model that is measured. origin: where its weights come from."""

    name: str
    origin: str
    load: Callable[[], torch.nn.Module]


@dataclass
class _Loaded:
    name: str
    model: torch.nn.Module
    runs: dict[str, Run]


@dataclass
class Bench:
    """Measures sides at each of `batches`, with prompts of `prompt_tokens` and `new_tokens` after them, in `rounds`
    after one that does not count, in each of `loops`. It may be interrupted: `result` is what was measured until then.

    on_run: called with a line that says what runs next.
    """

    device: torch.device
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    loops: tuple[str, ...] = tuple(LOOPS)
    on_run: Callable[[str], None] = lambda line: None
    sides: dict[str, dict] = field(default_factory=dict)
    left_out: list[dict] = field(default_factory=list)
    _timings: dict[tuple, list[Timing]] = field(default_factory=lambda: defaultdict(list))
    _ratios: dict[tuple, list[float]] = field(default_factory=lambda: defaultdict(list))
    _step_bytes: dict[tuple, float] = field(default_factory=dict)

    def __post_init__(self):
        self.bandwidth = bytes_per_second(self.device)

    def compare(self, subject: Side, others: list[Side]) -> None:
        """The subject beside each of the others in turn, or alone if there is none: two models are in memory at a time.
        A subject that does not load is raised; what else is wrong is noted in `left_out`."""
        mine = self._load(subject)
        for other in others:
            try:
                loaded = self._load(other)
            except Exception as error:  # whatever another tool raises is why it is not measured
                self._leave_out(other.name, None, None, error)
                continue
            self._take_turns([mine, loaded])
            del loaded
            _free()
        if not self._timings:
            self._take_turns([mine])

    def _load(self, side: Side) -> _Loaded:
        self.on_run(f"{side.name}: loading")
        started = time.perf_counter()
        model = side.load()
        self.sides[side.name] = {
            "origin": side.origin,
            "load_seconds": time.perf_counter() - started,
            "weights_bytes": model_bytes(model),
            "peak_bytes": None,
            "kernels": kernels(model, self.batches),
        }
        return _Loaded(side.name, model, {name: LOOPS[name](model) for name in self.loops})

    def _take_turns(self, loaded: list[_Loaded]) -> None:
        for batch in self.batches:
            running = [(side, loop) for side in loaded if self._fits(side, batch) for loop in side.runs]
            for number in range(self.rounds + 1):
                done = {}
                for side, loop in list(running):
                    timing = self._one_run(side, loop, batch, number)
                    if timing is None:
                        running.remove((side, loop))
                    elif number:
                        done[side.name, loop] = timing
                self._keep(done, batch, loaded[0].name)

    def _one_run(self, side: _Loaded, loop: str, batch: int, number: int) -> Timing | None:
        what = f"round {number} of {self.rounds}" if number else "warming up"
        self.on_run(f"{side.name}, batch {batch}, loop {loop}: {what}")
        ids = prompts(side.model.config.get_text_config().vocab_size, batch, self.prompt_tokens, number, self.device)
        try:
            with extra_memory(self.device) as extra:
                timing = side.runs[loop](ids, self.new_tokens)
        except Exception as error:  # the others are still worth measuring
            self._leave_out(side.name, loop, batch, error)
            return None
        facts = self.sides[side.name]
        facts["peak_bytes"] = max([facts["weights_bytes"] + e for e in extra] + [facts["peak_bytes"] or 0]) or None
        self._step_bytes[side.name, batch] = step_bytes(
            side.model, batch, self.prompt_tokens + self.new_tokens // 2
        )  # fmt: skip
        return timing

    def _keep(self, done: dict[tuple[str, str], Timing], batch: int, subject: str) -> None:
        for (name, loop), timing in done.items():
            self._timings[name, loop, batch].append(timing)
            if name != subject and (mine := done.get((subject, loop))):
                ratio = mine.decode_tokens_per_second / timing.decode_tokens_per_second
                self._ratios[name, loop, batch].append(ratio)

    def _fits(self, side: _Loaded, batch: int) -> bool:
        config, tokens = side.model.config.get_text_config(), self.prompt_tokens + self.new_tokens
        context = getattr(config, "max_position_embeddings", None) or tokens
        if tokens > context:
            reason = f"{tokens} tokens exceed the context of {context}"
        else:
            _free()
            width = 4 * config.hidden_size + 2 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
            needed = cache_bytes(config, batch, tokens, side.model.dtype)
            needed += batch * self.prompt_tokens * width * side.model.dtype.itemsize
            if needed <= (free := available_memory()):
                return True
            reason = f"keys, values and activations take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        self._leave_out(side.name, None, batch, InputError(reason))
        return False

    def _leave_out(self, name: str, loop: str | None, batch: int | None, error: Exception) -> None:
        left = {"side": name, "loop": loop, "batch": batch, "reason": first_line(error)}
        if left not in self.left_out:  # the subject takes part in every comparison
            self.left_out.append(left)

    def result(self) -> dict:
        """{"bytes_per_second", "prompt_tokens", "new_tokens", "rounds", "sides", "rows", "left_out"}. A row is a side
        in a loop at a batch size; its figures are medians, `spread` the least and most tokens per second of a round.
        `bandwidth_share` is that of the bytes that a step must read; `slower`: how many times faster the subject
        decodes than this side, in the same loop."""
        return {
            "bytes_per_second": self.bandwidth,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "sides": self.sides,
            "rows": [self._row(*key, timings) for key, timings in self._timings.items()],
            "left_out": self.left_out,
        }

    def _row(self, name: str, loop: str, batch: int, timings: list[Timing]) -> dict:
        rates = [timing.decode_tokens_per_second for timing in timings]
        step, ratios = statistics.median(t.step_seconds for t in timings), self._ratios[name, loop, batch]
        return {
            "side": name,
            "loop": loop,
            "batch": batch,
            "path": timings[-1].path,
            "decode_tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "first_token_seconds": statistics.median(t.first_seconds for t in timings),
            "prefill_tokens_per_second": statistics.median(t.prefill_tokens_per_second for t in timings),
            "step_bytes": self._step_bytes[name, batch],
            "bandwidth_share": self._step_bytes[name, batch] / step / self.bandwidth,
            "slower": statistics.median(ratios) if ratios else None,
            "rounds": len(timings),
        }


def kernels(model: torch.nn.Module, rows: tuple[int, ...]) -> list[dict]:
    """{"scheme", "shape", "count", "backend", "inputs", "kernels"} of each kind of quantized layer: what runs it, what
    becomes of its inputs, and where the backend has several kernels, which one for each number of rows. The shape is
    that of the product a layer is in."""
    kinds = Counter()
    for module in model.modules():
        if isinstance(module, LowbitLinear):
            kinds[module.scheme, module.prepared_shape, module.backend, module.dtype, module.inputs] += 1
        for weights in expert_weights(module).values():
            kinds[weights.scheme, weights.shape, weights.backend, model.dtype, weights.inputs] += 1
    found = []
    for (scheme, shape, backend, dtype, inputs), count in kinds.items():
        explain = getattr(get_backend(backend), "explain", None) if backend else None
        chosen = {} if explain is None else {m: explain(scheme, shape, dtype, m, model.device)["kernel"] for m in rows}
        found.append({"scheme": scheme.name, "shape": list(shape), "count": count, "backend": backend,
                      "inputs": inputs, "kernels": chosen})  # fmt: skip
    return found


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
