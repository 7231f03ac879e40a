"""How many runners a pool makes, as a table."""

from __future__ import annotations

import itertools

import pytest

from supervisor.pool import MOST_AT_ONCE, PoolCount, wanted
from taskkit.settings import PoolSettings


@pytest.mark.parametrize(
    ("fresh", "retired", "births", "expected"),
    [
        (0, 0, 0, 4),  # an empty pool of six: as many as one order may ask for
        (4, 0, 0, 2),
        (6, 0, 0, 0),  # at rest
        (0, 0, 4, 2),  # those on their way count
        (0, 0, 6, 0),
        (5, 1, 0, 0),  # one at work: its successor is one of the six
        (4, 2, 0, 0),
        (2, 4, 0, 0),
        (1, 4, 0, 1),  # standby: two fresh ones beyond those at work
        (0, 6, 0, 2),
        (1, 6, 0, 1),
        (1, 6, 1, 0),
        (2, 6, 0, 0),
        (0, 20, 0, 2),  # more at work than the size: standby all the same
        (9, 0, 0, 0),  # too many are not a negative number
    ],
)
def test_a_fresh_process_per_run(fresh: int, retired: int, births: int, expected: int) -> None:
    settings = PoolSettings(runners=6, standby=2)
    assert wanted(settings, PoolCount(fresh, retired, births)) == expected


@pytest.mark.parametrize(
    ("runners", "concurrency", "processes"),
    [(4, 1, 4), (4, 2, 2), (5, 2, 3), (1, 8, 1), (8, 8, 1), (9, 8, 2)],
)
def test_shared_processes_are_as_many_as_hold_all_runs(
    runners: int, concurrency: int, processes: int
) -> None:
    settings = PoolSettings(runners=runners, concurrency=concurrency, runs=100)
    made = 0
    while more := wanted(settings, PoolCount(made, 0, 0)):
        made += more
    assert made == processes


def test_processes_of_many_runs_need_no_standby() -> None:
    settings = PoolSettings(runners=2, runs=100, standby=5)
    assert wanted(settings, PoolCount(fresh=2, retired=0, births=0)) == 0
    assert wanted(settings, PoolCount(fresh=1, retired=1, births=0)) == 1


def test_no_standby_under_load_makes_none() -> None:
    settings = PoolSettings(runners=2, standby=0)
    assert wanted(settings, PoolCount(fresh=0, retired=2, births=0)) == 0
    assert wanted(settings, PoolCount(fresh=0, retired=1, births=0)) == 1


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("standby", range(4))
def test_following_the_answer_fills_the_pool_and_stops(size: int, standby: int) -> None:
    settings = PoolSettings(runners=size, standby=standby)
    for fresh, retired, births in itertools.product(range(12), range(12), range(5)):
        number = wanted(settings, PoolCount(fresh, retired, births))
        assert 0 <= number <= MOST_AT_ONCE
        total = fresh + births
        while number:
            total += number
            number = wanted(settings, PoolCount(total, retired, 0))
        assert total >= max(standby, size - retired)
        assert total == max(fresh + births, standby, size - retired), "not one more than needed"
