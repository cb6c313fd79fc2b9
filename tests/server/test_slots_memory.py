"""How many slots a server has, by the memory that their keys and values take."""

import logging

import pytest

from lowbit.errors import InputError
from lowbit.generation.slots import Slots
from lowbit.generation.stream import open_session
from lowbit.options import BatchingOptions, LimitOptions
from lowbit.server import run

LIMITS = LimitOptions(context=128)


@pytest.fixture
def session(folder):
    return open_session(folder)


@pytest.fixture
def free(session, monkeypatch):
    """free(slots) -> there is memory for so many, and a byte less than for one more."""
    each = Slots(session.decoder, 1, 128).bytes

    def set_free(slots: int) -> None:
        monkeypatch.setattr(run, "available_memory", lambda: (slots + 1) * each - 1)

    return set_free


def slots_of(session, asked: int | None):
    answers = run.answers_of(session, LIMITS, BatchingOptions(slots=asked), 64)
    answers.stop()
    answers.end()
    return answers.slots


@pytest.mark.parametrize(("room", "count"), [(40, 16), (31, 15), (10, 5), (4, 2)])
def test_half_of_the_free_memory_is_for_slots_nobody_asked_for(session, free, caplog, room, count):
    free(room)
    with caplog.at_level(logging.WARNING):
        assert slots_of(session, None).count == count
    assert ("requests share steps, not 16" in caplog.text) == (count < 16)


def test_answers_come_one_after_the_other_where_two_slots_have_no_room(session, free, caplog):
    free(2)
    with caplog.at_level(logging.WARNING):
        assert slots_of(session, None) is None
    assert "one after the other: a slot of 128 tokens takes" in caplog.text


def test_slots_that_are_asked_for_have_all_of_the_free_memory(session, free):
    free(16)
    assert slots_of(session, 16).count == 16
    free(15)
    with pytest.raises(InputError, match=r"a slot of 128 tokens takes .* too few for 16: lower --slots, or --context"):
        slots_of(session, 16)
