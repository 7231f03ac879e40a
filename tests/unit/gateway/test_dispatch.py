"""Which run goes where: priorities, times to wait for, runs that left, seats of runners."""

from __future__ import annotations

import random

import pytest

from gateway.dispatch import Queues, Seat, choose, pools_of, sent_home
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


# --- tasks that are held, runs that have to be alone


def _of(task: str, no: int, *, pool: str = "default", priority: int = 0, suspect: bool = False) -> RunRow:
    return RunRow(no=no, id=f"run-{no}", task=task, pool=pool, priority=priority, suspect=suspect)


def test_runs_of_a_held_task_wait_without_being_in_the_way_and_keep_their_order(rng: random.Random) -> None:
    queues = Queues()
    runs = [_of("sick" if no % 2 else "well", no, priority=rng.randint(-2, 2)) for no in range(1, 401)]
    for run in runs[:200]:
        queues.add(run, 0.0)
    queues.hold("sick")
    for run in runs[200:]:
        queues.add(run, 0.0)
    ordered = sorted(runs, key=lambda run: (-run.priority, run.no))
    assert _drain(queues) == [run.no for run in ordered if run.task == "well"]
    assert not queues.waits("default", 0.0)
    assert len(queues) == 200
    queues.let_go("sick")
    assert _drain(queues) == [run.no for run in ordered if run.task == "sick"]


def test_each_held_run_is_put_aside_once() -> None:
    """A thousand in front of the one that may go must not be looked at in every round."""
    queues = Queues()
    for no in range(1, 1001):
        queues.add(_of("sick", no, priority=5), 0.0)
    queues.hold("sick")
    queues.add(_of("well", 2000), 0.0)
    assert queues.waits("default", 0.0)
    assert len(queues._ready["default"]) == 1


def test_of_a_task_on_trial_one_run_is_given_out_the_next_in_turn() -> None:
    queues = Queues()
    queues.hold("sick")
    for no, priority in ((1, 0), (2, 9), (3, 0)):
        queues.add(_of("sick", no, priority=priority), 0.0)
    queues.add(_of("sick", 4, pool="other"), 0.0)
    assert queues.take_alone("default", 0.0) is None
    assert queues.waits("default", 0.0, {"sick"})
    assert not queues.waits("default", 0.0)
    queues.remove(2)
    run = queues.take_alone("default", 0.0, {"sick"})
    assert run is not None
    assert run.no == 1
    assert queues.take("default", 0.0) is None
    assert pools_of({"default": 1, "other": 1, "empty": 1}, queues, 0.0, {"sick"}) == ["default", "other"]


def test_held_runs_that_are_cancelled_do_not_pile_up() -> None:
    queues = Queues()
    queues.hold("sick")
    queues.add(_of("well", 1), 0.0)
    for no in range(2, 5000):
        queues.add(_of("sick", no, priority=1), 0.0)
        queues.waits("default", 0.0)
        queues.remove(no)
    assert sum(len(heap) for heap in queues._heaps()) < 500
    queues.let_go("sick")
    assert _drain(queues) == [1]


def test_suspects_have_a_queue_of_their_own() -> None:
    queues = Queues()
    queues.add(_of("t", 1, suspect=True), 0.0)
    queues.add(_of("t", 2), 0.0)
    assert queues.waits_alone("default", 0.0)
    assert _drain(queues) == [2]
    assert queues.waits("default", 0.0)
    queues.hold("t")
    assert queues.take_alone("default", 0.0) is None
    queues.let_go("t")
    run = queues.take_alone("default", 0.0)
    assert run is not None
    assert run.no == 1


def test_whoever_must_be_alone_gets_a_runner_without_any() -> None:
    busy, free = Seat("a", 1, 4, 9), Seat("b", 0, 4, 9)
    assert choose([busy, free], 8, alone=True) == "b"
    assert choose([busy], 8, alone=True) is None
    assert choose([busy, free], 1, alone=True) is None


@pytest.mark.parametrize(
    ("seats", "size", "chosen"),
    [
        ([Seat("a", 2, 4, 9), Seat("b", 1, 4, 9)], 2, "b"),  # all at work: the least loaded makes way
        ([Seat("a", 2, 4, 9), Seat("b", 0, 4, 9)], 2, None),  # one is free
        ([Seat("a", 2, 4, 9)], 2, None),  # one is being made
        ([Seat("a", 2, 4, 9), Seat("b", 1, 4, 0)], 2, None),  # one leaves: another is being made
        ([], 1, None),
    ],
)
def test_who_makes_way(seats: list[Seat], size: int, chosen: str | None) -> None:
    assert sent_home(seats, size) == chosen
