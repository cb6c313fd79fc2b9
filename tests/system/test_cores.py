"""How many cores others leave free."""

from itertools import count

import pytest

from lowbit.system.cores import FreeCores, Reading, read


def cores_with(*steps: tuple[float, float], cores: int = 4) -> FreeCores:
    """Each reading is a second after the one before; steps: what all and this process worked in it."""
    busy = own = 0.0
    readings = [Reading(0.0, 0.0, 0.0, cores)]
    for number, (all_worked, own_worked) in enumerate(steps, 1):
        busy, own = busy + all_worked, own + own_worked
        readings.append(Reading(float(number), busy, own, cores))
    remaining = iter(readings)
    return FreeCores(period=0.0, reader=lambda: next(remaining))


@pytest.mark.parametrize(
    "all_worked, own_worked, expected",
    [(4.0, 4.0, 4), (0.0, 0.0, 4), (4.0, 3.8, 4), (4.0, 3.0, 3), (4.0, 2.4, 2), (4.0, 1.0, 1), (4.0, 0.1, 1)],
)
def test_what_others_use_is_not_free(all_worked, own_worked, expected):
    assert cores_with((all_worked, own_worked)).limit(4) == expected


def test_threads_come_back_when_the_others_are_gone():
    cores = cores_with((4.0, 2.0), (3.0, 3.0))
    assert [cores.limit(4), cores.limit(4)] == [2, 4]


def test_no_more_threads_than_wanted():
    assert cores_with((1.0, 1.0)).limit(2) == 2 and cores_with((4.0, 1.0)).limit(1) == 1


def test_where_the_system_says_nothing():
    assert FreeCores(period=0.0, reader=lambda: None).limit(4) == 4
    number = count()
    answers = FreeCores(period=0.0, reader=lambda: None if next(number) else Reading(0.0, 0.0, 0.0, 4))
    assert [answers.limit(4), answers.limit(4)] == [4, 4]


def test_a_period_has_to_pass(monkeypatch):
    calls = count()

    def reader():
        next(calls)
        return Reading(float("inf"), 0.0, 0.0, 4)

    assert FreeCores(period=1.0, reader=reader).limit(4) == 4 and next(calls) == 1


def test_this_machine():
    found = read()
    assert found is None or (found.cores >= 1 and found.busy >= 0 and found.own > 0)
