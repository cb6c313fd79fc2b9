"""Slots of a decoder: requests whose tokens are made in the same steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit.errors import LowbitError
from lowbit.generation.answer import Answer
from lowbit.generation.eligibility import Refusal
from lowbit.generation.loop import Decoder
from lowbit.generation.request import Request
from lowbit.generation.sampling import Sampling, pick
from lowbit.generation.slots.columns import NO_SETTINGS, Columns, copy_positions
from lowbit.generation.steps.cache import room
from lowbit.generation.steps.graph import Eager
from lowbit.generation.steps.step import Step
from lowbit.layers.inputs import inputs_of_model
from lowbit.options import TokenOptions
from lowbit.parallel import ranks_of

End = Callable[[Exception | None], None]
_MULTIPLE = room(1)
# A step sees no more than so many times the columns that are taken, or it is recorded anew
_WASTE = 2


def refuse_slots(decoder: Decoder) -> Refusal | None:
    """Why a decoder has no slots, None if it can have some. A few tokens are generated to find out."""
    runner = decoder.runner
    for reason, holds in {
        "drafts are checked for one request at a time": decoder.draft is not None,
        "several processes share the model": ranks_of(decoder.model) is not None,
        "keys and values in 8 bits are scaled for one request at a time": runner.int8_cache,
        "steps that are compiled are those of one request": runner.compile,
    }.items():
        if holds:
            return Refusal(reason, by_nature=True)
    if isinstance(runner.graphs, Eager):
        return Refusal("steps are neither recorded nor captured here")
    try:
        decoder.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=2, eos_token_id=())
    except LowbitError as error:
        return Refusal(str(error))
    decoder.forget()
    stats = decoder.stats
    return None if stats.path == runner.graphs.path else Refusal(stats.why or f"it runs in the {stats.path}")


class SlotStep(Step):
    """Gives `scores` [B, V], the logits in float32, and the most likely `tokens` [B]; the host picks, and feeds."""

    scores: torch.Tensor

    def __call__(self) -> None:
        self.scores = self.logits()
        self.tokens.copy_(pick(self.scores, Sampling(), None, None))


@dataclass(eq=False)
class _Row:
    """A request in a slot. length: its positions in the cache. token: what the next step is fed for it."""

    request: Request
    answer: Answer
    end: End
    generator: torch.Generator
    seen: torch.Tensor | None
    length: int
    token: int = 0

    @property
    def sampling(self) -> Sampling:
        return self.request.settings.sampling

    def take(self, token: int) -> bool:
        """Returns whether that was its last."""
        self.token = token
        return self.answer.take([token]) or len(self.answer.steps) == self.request.max_new_tokens


class Slots:
    """Requests that join and leave between steps. Prompts are run as `Decoder` runs them, one at a time, and what they
    leave in its cache is copied into a row of another one, whose first rows are those that are taken. Steps are
    recorded or captured for the first 1, 2, 4, 8, ... rows.

    Everything is called from one thread. No call raises what a request did: its `end` is told.

    Args:
        decoder: One that `refuse_slots` does not refuse.
        count: Requests that share a step at most.
        tokens: Of a prompt and its answer, at most.
    """

    def __init__(self, decoder: Decoder, count: int, tokens: int):
        self.decoder, self.count, self.tokens = decoder, count, tokens
        self.rows: list[_Row] = []
        self.most = room(tokens) + _MULTIPLE  # columns: rows move at most once in so many steps as the second has
        self._columns: Columns | None = None
        self._steps: dict[int, tuple[SlotStep, Callable[[], None]]] = {}  # by the rows that they are for
        self._laid_out: SlotStep | None = None  # the step that knows where the rows are
        self._joined_last: _Row | None = None  # whose prompt is in the cache of the decoder

    @property
    def columns(self) -> Columns:
        return self._columns or self._allocate(_MULTIPLE)

    @property
    def free(self) -> int:
        return self.count - len(self.rows)

    @property
    def bytes(self) -> int:
        """Of keys and values, if all slots are full."""
        return self.columns.bytes_of_column * self.most

    def request(self, ids: torch.Tensor, tokens: TokenOptions, prefill_chunk: int | None) -> Request:
        return self.decoder.request(ids, None, tokens, prefill_chunk=prefill_chunk)

    def takes(self, request: Request) -> bool:
        """Whether a slot is large enough, and positions are encoded in it as they are for the request alone."""
        return request.length <= self.tokens and not self.decoder.eligibility.encodes_by_length(request)

    @torch.inference_mode()
    def join(
        self,
        request: Request,
        on_token: Callable[[list[int]], bool | None],
        end: End,
        on_chunk: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Run a prompt; its row is in all steps from then on, until it ends.

        Args:
            request: One that is taken, while a slot is free.
            on_token: Called with each token; True ends the request.
            end: Called once, with what went wrong, if anything did.
            on_chunk: Called with the tokens of each chunk of the prompt that was run. It may make a step.
        """
        self._joined_last = None
        answer, runner = Answer(1, request.settings.eos, on_token), self.decoder.runner
        try:
            if (refusal := self.decoder.start(request, answer, on_chunk)) is not None:
                raise LowbitError(refusal.reason)
            step, generator = runner.step, torch.Generator(self.decoder.model.device)
            generator.set_state(step.generator.get_state())
            seen = None if step.seen is None else step.seen.clone()
            row = _Row(request, answer, end, generator, seen, request.prompt_length)
            over = row.take(step.tokens.tolist()[0])
            if not over:
                self._place(row)
        except Exception as error:
            end(error)
        else:
            if over:
                self._finish(row, None)

    @torch.inference_mode()
    def step(self) -> None:
        """Make the next token of each row."""
        try:
            tokens = self._next_tokens()
        except Exception as error:
            rows, self.rows, self._columns, self._laid_out = self.rows, [], None, None
            self._steps.clear()
            for row in rows:
                self._finish(row, error)
            return
        for row, token in zip(list(self.rows), tokens, strict=True):
            try:
                if row.take(token):
                    self._leave(row, None)
            except Exception as error:
                self._leave(row, error)

    def _next_tokens(self) -> list[int]:
        self._make_room()
        step, replay = self._step_for(len(self.rows))
        if self._laid_out is not step:
            self._lay_out(step)
        fed = [row.token for row in self.rows] + [0] * (len(step.tokens) - len(self.rows))
        step.inputs.copy_(torch.tensor(fed)[:, None])
        step.filled = self.columns.end
        replay()
        step.positions += 1
        self.columns.end += 1
        for row in self.rows:
            row.length += 1
        return self._pick(step.tokens.tolist(), step.scores)

    def _pick(self, likeliest: list[int], scores: torch.Tensor) -> list[int]:
        """The next token of each row, as `Step` picks it for one request; rows that sample alike at once. scores [B, V]
        and where they are largest."""
        alike: dict[Sampling, list[int]] = {}
        for at, row in enumerate(self.rows):
            if row.sampling != Sampling():
                alike.setdefault(row.sampling, []).append(at)
        for sampling, places in alike.items():
            rows = [self.rows[at] for at in places]
            seen = [row.seen for row in rows if row.seen is not None]
            tokens = pick(scores[places], sampling, torch.cat(seen) if seen else None, [row.generator for row in rows])
            for at, row, token in zip(places, rows, tokens.tolist(), strict=True):
                likeliest[at] = token
                if row.seen is not None:
                    row.seen[0, max(token, 0)] = True
        return likeliest[: len(self.rows)]

    def _place(self, row: _Row) -> None:
        """Behind the taken rows, with what the cache of the decoder holds of it."""
        taken, source = len(self.rows), self.decoder.runner.cache.cache
        end = max(row.length, self.columns.end if taken else 0)
        self._reserve(end + 1)
        self._move(end)
        to_rows = slice(taken, taken + 1)
        copy_positions(source, slice(1), 0, self.columns.cache, to_rows, end - row.length, row.length)
        self.rows.append(row)
        self._joined_last = row

    def _leave(self, row: _Row, error: Exception | None) -> None:
        """The last row takes its place."""
        at, last, cache = self.rows.index(row), self.rows[-1], self.columns.cache
        if error is not None:
            self.columns.clear(at)
        elif row is self._joined_last:
            self._give_back(row, at)
        if last is not row:
            start = self.columns.end - last.length
            end_row = slice(len(self.rows) - 1, len(self.rows))
            copy_positions(cache, end_row, start, cache, slice(at, at + 1), start, last.length)
            self.rows[at] = last
        self.rows.pop()
        self._laid_out = None
        self._finish(row, error)

    def _give_back(self, row: _Row, at: int) -> None:
        """The decoder goes on from its answer, where that is what a prompt starts with: a turn of a chat."""
        start, prefix = row.request.prompt_length, self.decoder.runner.cache
        made, first = row.length - start, self.columns.end - row.length
        copy_positions(self.columns.cache, slice(at, at + 1), first + start, prefix.cache, slice(1), start, made)
        fed = row.answer.tokens()[:, :made].to(row.request.prompt.device)
        prefix.append(torch.stack([fed, torch.ones_like(fed)]))

    def _finish(self, row: _Row, error: Exception | None) -> None:
        metrics, decoder = row.answer.metrics, self.decoder
        metrics.end_decode()
        decoder.stats = metrics.stats(
            row.request.mask, row.answer.lengths, decoder.runner.graphs.path, None, inputs_of_model(decoder.model)
        )
        row.end(error)

    # Where the rows are

    @property
    def _longest(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def _move(self, end: int) -> None:
        self.columns.move(end, len(self.rows), self._longest)
        self._laid_out = None

    def _make_room(self) -> None:
        """For a step. Rows go back to the first columns where that frees half of those they have taken: else those that
        a step sees would be more and more, the longer a server runs."""
        end, longest = self.columns.end, self._longest
        if end % _MULTIPLE:
            return
        if 2 * longest <= end or end == self.most:
            self._move(longest)
        else:
            self._reserve(end + 1)

    def _reserve(self, columns: int) -> None:
        old, longest, rows = self.columns, self._longest, slice(len(self.rows))
        if columns <= old.length:
            return
        self._steps.clear()  # they are of the old memory
        new = self._allocate(min(room(columns, old.length), self.most))
        copy_positions(old.cache, rows, old.end - longest, new.cache, rows, old.end - longest, longest)
        new.set_end(old.end)
        self._laid_out = None

    @torch.inference_mode()
    def _allocate(self, length: int) -> Columns:
        self._columns = Columns(self.decoder.model, self.decoder.runner.make_cache, self.count, length)
        return self._columns

    def _step_for(self, rows: int) -> tuple[SlotStep, Callable[[], None]]:
        """A step of so many rows or a few more, and what repeats it."""
        size, columns = min(1 << (rows - 1).bit_length(), self.count), self.columns
        made = self._steps.get(size)
        if made is None or (made[0].visible or 0) > _WASTE * room(columns.end + 1):
            step = SlotStep(self.decoder.model, columns.first(size), size, columns.length, NO_SETTINGS)
            self._lay_out(step)
            step.filled = columns.end
            replay = self.decoder.runner.graphs.capture(step, step.generator)
            columns.set_end(columns.end)  # steps that were made for it do not count
            made = self._steps[size] = step, replay
        return made

    def _lay_out(self, step: SlotStep) -> None:
        """Tell a step which columns are whose. Rows of nobody see what they are fed themselves."""
        lengths = torch.zeros(len(step.tokens), 1, dtype=torch.long)
        lengths[: len(self.rows), 0] = torch.tensor([row.length for row in self.rows])
        step.mask.copy_(torch.arange(step.length) >= self.columns.end - lengths)
        step.positions.copy_(lengths)
        self._laid_out = step
