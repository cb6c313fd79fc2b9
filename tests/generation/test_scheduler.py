"""The thread that runs requests: who comes when, and what becomes of those that fail, wait, or are alone."""

import threading

import pytest
import torch
from models import tiny_model

from lowbit.generation import Decoder
from lowbit.generation.slots import Job, Scheduler, Slots, refuse_slots
from lowbit.options import TokenOptions

SECONDS = 300.0  # nothing is waited for any longer


@pytest.fixture(scope="module")
def model():
    made = tiny_model(max_position_embeddings=4096)
    made.generation_config.eos_token_id = None
    return made


class Run:
    """A scheduler, and what happened in it: (event, name of the job) in order. Nothing is run before `go`."""

    def __init__(self, model, slots: int | None, chunk: int = 1000, tokens: int = 300):
        self.decoder, self.log = Decoder(model), []
        assert refuse_slots(self.decoder) is None
        self.slots = None if slots is None else Slots(self.decoder, slots, tokens)
        self.scheduler = Scheduler(self.slots, chunk, "lowbit-test-scheduler")
        self.opened, self.ended = threading.Event(), threading.Semaphore(0)
        self.jobs, self.errors, self.tokens = 0, {}, {}
        self.scheduler.submit(Job(lambda: self.opened.wait(SECONDS) and None))

    def ask(self, name: str, length: int = 4, new: int = 6, wanted: bool = True, on_token=lambda n: None) -> None:
        ids, options = torch.arange(self.jobs, self.jobs + length)[None] % 100 + 3, TokenOptions(max_new_tokens=new)
        made = self.tokens[name] = []

        def take(tokens: list[int]) -> bool | None:
            self.log.append(("first" if not made else "more", name))
            made.extend(tokens)
            return on_token(len(made))

        def end(error: Exception | None) -> None:
            self.log.append(("end", name))
            self.errors[name] = error
            self.ended.release()

        def alone() -> None:
            self.log.append(("alone", name))
            self.decoder.generate(ids, **vars(options), on_token=take)

        request = None if self.slots is None else self.slots.request(ids, options, 16)
        self.scheduler.submit(Job(alone, end, lambda: wanted, request, take))
        self.jobs += 1

    def go(self) -> list[tuple[str, str]]:
        self.opened.set()
        for _ in range(self.jobs):
            assert self.ended.acquire(timeout=SECONDS)
        self.scheduler.close()
        self.scheduler.join()
        return self.log

    def order(self, *events: str) -> list[str]:
        return [name for event, name in self.go() if event in events]


def test_who_comes_first_is_served_first(model):
    """More than there are slots: each joins when one before it leaves, in the order in which they came."""
    run = Run(model, slots=3)
    for number in range(10):
        run.ask(str(number), new=3 + 4 * (number % 3))
    assert run.order("first") == [str(number) for number in range(10)]
    running = set()
    for event, name in run.log:
        running = running | {name} if event == "first" else running - {name} if event == "end" else running
        assert len(running) <= 3
    assert not any(run.errors.values())


def test_without_slots_all_run_alone_one_after_the_other(model):
    run = Run(model, slots=None)
    for name in "abc":
        run.ask(name, new=2)
    wanted = [(event, name) for name in "abc" for event in ("alone", "first", "more", "end")]
    assert run.go() == wanted


def test_what_no_slot_takes_waits_until_it_is_alone_and_the_others_behind_it(model):
    run = Run(model, slots=4)
    run.ask("a", new=20), run.ask("b", new=5), run.ask("long", length=290, new=20), run.ask("c", new=3)
    run.go()
    at = {each: run.log.index(each) for each in run.log}
    assert at["end", "b"] < at["end", "a"] < at["alone", "long"] < at["end", "long"] < at["first", "c"]
    assert [len(run.tokens[name]) for name in ("a", "b", "long", "c")] == [20, 5, 20, 3]


def test_what_nobody_wants_any_more_is_not_run(model):
    run = Run(model, slots=2)
    run.ask("a"), run.ask("gone", wanted=False), run.ask("b", on_token=lambda made: made == 2)
    assert run.order("first") == ["a", "b"] and run.errors == {"a": None, "gone": None, "b": None}
    assert len(run.tokens["b"]) == 2


def test_an_error_is_told_to_its_own_job(model):
    def fail(made: int) -> None:
        if made == 3:
            raise ValueError("this one")

    for slots in (3, None):
        run = Run(model, slots)
        run.ask("a", new=8), run.ask("bad", new=8, on_token=fail), run.ask("b", new=8)
        run.go()
        assert str(run.errors.pop("bad")) == "this one" and run.errors == {"a": None, "b": None}
        assert [len(run.tokens[name]) for name in ("a", "b")] == [8, 8]


def test_steps_between_prompts(model):
    """Two chunks of 16 between two steps: they are made in the middle of a prompt that will join."""
    run = Run(model, slots=4, chunk=32)
    for name in "abcd":
        run.ask(name, length=16, new=40)
    assert run.order("first", "more")[:12] == [*"a", *"ab", *"c", *"abcd", *"abcd"]


def test_those_that_wait_when_it_closes_are_given_back(model):
    run = Run(model, slots=1)
    started, go_on = threading.Event(), threading.Event()
    run.ask("runs", on_token=lambda made: started.set() or (go_on.wait(SECONDS) and None))
    run.ask("waits")
    run.opened.set()
    assert started.wait(SECONDS)
    waiting = run.scheduler.close()
    go_on.set()
    run.scheduler.join()
    assert len(waiting) == 1 and not run.tokens["waits"] and len(run.tokens["runs"]) == 6
    with pytest.raises(RuntimeError, match="closed"):
        run.scheduler.submit(Job(lambda: None))
