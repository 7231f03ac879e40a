"""Which run goes where: priorities, times to wait for, runs that left, seats of runners."""

from __future__ import annotations

import random

import pytest

from gateway.dispatch import Queues, Seat, choose, pools_of
from gateway.store.rows import RunRow


def _run(no: int, *, pool: str = "default", priority: int = 0, run_after: float | None = None) -> RunRow:
    return RunRow(no=no, id=f"run-{no}", task="t", pool=pool, priority=priority, run_after=run_after)


def _drain(queues: Queues, pool: str = "default", now: float = 0.0) -> list[int]:
    taken = []
    while (run := queues.take(pool, now)) is not None:
        taken.append(run.no)
    return taken


def test_larger_priority_first_then_older_first(rng: random.Random) -> None:
    runs = [_run(no, priority=rng.randint(-3, 3)) for no in range(1, 1001)]
    queues = Queues()
    for run in rng.sample(runs, len(runs)):
        queues.add(run, 0.0)
    assert _drain(queues) == [run.no for run in sorted(runs, key=lambda run: (-run.priority, run.no))]
    assert len(queues) == 0


def test_pools_do_not_see_each_others_runs() -> None:
    queues = Queues()
    queues.add(_run(1, pool="a"), 0.0)
    queues.add(_run(2, pool="b"), 0.0)
    assert queues.depth() == {"a": 1, "b": 1}
    assert pools_of({"a": 1, "b": 1, "c": 1}, queues, 0.0) == ["a", "b"]
    assert _drain(queues, "b") == [2]
    assert pools_of({"a": 1, "b": 1}, queues, 0.0) == ["a"]
    assert queues.take("nowhere", 0.0) is None


def test_a_run_waits_for_its_time() -> None:
    queues = Queues()
    queues.add(_run(1, run_after=20.0), 0.0)
    queues.add(_run(2, run_after=10.0), 0.0)
    assert queues.next_due() == 10.0
    assert not queues.waits("default", 9.9)
    assert queues.take("default", 9.9) is None
    assert queues.waits("default", 10.0)
    assert _drain(queues, now=10.0) == [2]
    assert queues.next_due() == 20.0
    assert _drain(queues, now=25.0) == [1]
    assert queues.next_due() is None


def test_a_time_that_has_passed_is_no_reason_to_wait() -> None:
    queues = Queues()
    queues.add(_run(1, run_after=5.0), 6.0)
    assert queues.next_due() is None
    assert _drain(queues, now=6.0) == [1]


def test_a_wall_clock_that_steps_back_loses_no_run() -> None:
    queues = Queues()
    queues.add(_run(1, run_after=100.0), 50.0)
    assert queues.waits("default", 100.0)  # it is due …
    queues.take("default", 90.0)  # … and the clock is set back before a runner is free
    assert len(queues) == 0 or _drain(queues, now=101.0) == [1]


def test_a_run_that_left_is_passed_over() -> None:
    queues = Queues()
    for no in (1, 2, 3):
        queues.add(_run(no), 0.0)
    queues.add(_run(4, run_after=9.0), 0.0)
    queues.remove(1)
    queues.remove(4)
    queues.remove(99)
    assert len(queues) == 2
    assert queues.next_due() is None
    assert _drain(queues, now=10.0) == [2, 3]
    assert not queues.waits("default", 10.0)


def test_a_run_that_comes_back_is_given_out_once() -> None:
    queues = Queues()
    run = _run(1)
    queues.add(run, 0.0)
    assert queues.take("default", 0.0) is run
    run.run_after = 7.0
    queues.add(run, 1.0)
    assert _drain(queues, now=6.0) == []
    assert _drain(queues, now=7.0) == [1]


def test_a_run_that_is_added_twice_is_not_given_out_before_its_time() -> None:
    """A gateway that finds a lost attempt puts its run back, and then counts all that wait."""
    queues = Queues()
    run = _run(1)
    queues.add(run, 0.0)
    queues.add(run, 0.0)
    assert queues.take("default", 0.0) is run
    run.run_after = 50.0
    queues.add(run, 1.0)
    assert queues.take("default", 2.0) is None
    assert _drain(queues, now=50.0) == [1]


def test_runs_that_left_do_not_pile_up_behind_one_that_waits() -> None:
    """Submitted and cancelled for hours while the pool is full: the memory of it must stay small."""
    queues = Queues()
    queues.add(_run(1, priority=100), 0.0)
    for no in range(2, 20_002):
        queues.add(_run(no, run_after=None if no % 2 else 1e9), 0.0)
        queues.remove(no)
        assert queues.waits("default", 0.0)
    assert sum(map(len, queues._ready.values())) + len(queues._later) < 1000
    assert _drain(queues) == [1]


@pytest.mark.parametrize(
    ("seats", "limit", "chosen"),
    [
        ([], 4, None),
        ([Seat("a", 0, 1, 1)], 4, "a"),
        ([Seat("a", 0, 1, 0)], 4, None),  # used up
        ([Seat("a", 1, 1, 5)], 4, None),  # full
        ([Seat("a", 1, 1, 5), Seat("b", 0, 1, 5)], 1, None),  # the pool performs as many as it may
        ([Seat("a", 1, 1, 5), Seat("b", 0, 1, 5)], 2, "b"),
        ([Seat("a", 2, 4, 9), Seat("b", 1, 4, 9)], 99, "b"),  # least loaded
        ([Seat("a", 0, 1, 9), Seat("b", 0, 1, 2)], 99, "b"),  # nearest to its end
        ([Seat("b", 0, 1, 2), Seat("a", 0, 1, 2)], 99, "a"),  # by name, so that it is the same every time
    ],
)
def test_choice_of_a_runner(seats: list[Seat], limit: int, chosen: str | None) -> None:
    assert choose(seats, limit) == chosen
