"""Circuits: what trips one, what closes it, what a new gateway remembers of it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.breaker import Breaker
from taskkit.lifecycle import Ending
from taskkit.settings import BreakerSettings

SURVIVED = [Ending.RETURNED, Ending.RAISED, Ending.CANCELLED, Ending.TIMED_OUT]


def breaker(**changes: Any) -> Breaker:
    values: dict[str, Any] = {"crashes": 3, "period": 60.0, "pause": 10.0, "longest_pause": 35.0}
    return Breaker(BreakerSettings(**values | changes))


def crash(circuits: Breaker, *runs: int, at: float = 0.0) -> None:
    for run in runs:
        circuits.ended("t.f", run, Ending.CRASHED, f"run {run} died", at)


def tripped(**changes: Any) -> Breaker:
    """Return a breaker whose task was tripped at moment 0."""
    circuits = breaker(**changes)
    crash(circuits, 1, 2, 3)
    assert circuits.holds("t.f")
    return circuits


def test_distinct_crashes_within_the_period_trip_the_task() -> None:
    circuits = breaker()
    crash(circuits, 1, 2)
    assert not circuits.holds("t.f")
    crash(circuits, 3, at=60.0)
    assert circuits.holds("t.f")
    assert not circuits.holds("t.g")
    (found,) = circuits.all_tripped(65.0)
    assert (found.task, found.remaining, found.crashes, found.trial) == ("t.f", 5.0, 3, None)
    assert found.cause == "run 3 died"


def test_one_run_that_crashes_often_trips_nothing() -> None:
    circuits = breaker()
    crash(circuits, *[1] * 9)
    assert not circuits.holds("t.f")


def test_crashes_age() -> None:
    circuits = breaker()
    crash(circuits, 1, 2)
    crash(circuits, 3, at=60.5)
    assert not circuits.holds("t.f")
    crash(circuits, 4, 5, at=61.0)
    assert circuits.holds("t.f")


@pytest.mark.parametrize("ending", [ending for ending in Ending if ending is not Ending.CRASHED])
def test_only_a_success_forgets_crashes(ending: Ending) -> None:
    circuits = breaker()
    crash(circuits, 1, 2)
    assert circuits.ended("t.f", 9, ending, "", 1.0) == (ending is Ending.RETURNED)
    crash(circuits, 3, at=2.0)
    assert circuits.holds("t.f") == (ending is not Ending.RETURNED)


@pytest.mark.parametrize("changes", [{"crashes": 0}, {"exempt": ["t.f"]}, {"exempt": ["x", "t.*"]}])
def test_what_is_not_watched_is_never_held(changes: dict[str, Any]) -> None:
    circuits = breaker(**changes)
    crash(circuits, *range(20))
    assert not circuits.holds("t.f")
    assert circuits.dump("t.f", 0.0, 0.0) is None


def test_after_the_pause_one_run_is_tried() -> None:
    circuits = tripped()
    assert circuits.next_trial(0.0) == 10.0
    assert not circuits.trials(9.9)
    assert circuits.trials(10.0) == {"t.f"}
    assert circuits.next_trial(10.0) is None, (
        "nothing to wait for: a round that finds no runner must not spin"
    )
    circuits.trying("t.f", 7)
    assert not circuits.trials(99.0)
    assert circuits.all_tripped(99.0)[0].trial == 7


@pytest.mark.parametrize("ending", SURVIVED)
def test_a_run_on_trial_that_survives_closes_it(ending: Ending) -> None:
    circuits = tripped()
    circuits.trying("t.f", 7)
    assert circuits.ended("t.f", 7, ending, "", 12.0)
    assert not circuits.holds("t.f")
    crash(circuits, 8, 9, at=13.0)
    assert not circuits.holds("t.f"), "it begins anew"


def test_each_trial_that_crashes_doubles_the_pause_up_to_the_longest() -> None:
    circuits, moment = tripped(), 10.0
    for pause in (20.0, 35.0, 35.0):
        circuits.trying("t.f", 7)
        crash(circuits, 7, at=moment)
        assert circuits.next_trial(moment) == moment + pause
        moment += pause


def test_a_trial_that_is_lost_says_nothing() -> None:
    circuits = tripped()
    circuits.trying("t.f", 7)
    assert circuits.ended("t.f", 7, Ending.LOST, "", 11.0)
    assert circuits.trials(11.0) == {"t.f"}


@pytest.mark.parametrize("ending", list(Ending))
def test_what_was_begun_before_decides_nothing(ending: Ending) -> None:
    circuits = tripped()
    circuits.trying("t.f", 7)
    assert not circuits.ended("t.f", 6, ending, "", 11.0)
    assert circuits.holds("t.f")
    assert not circuits.trials(11.0)


def test_somebody_lets_it_go() -> None:
    circuits = tripped()
    assert circuits.reset("t.f")
    assert not circuits.reset("t.f")
    assert not circuits.holds("t.f")


# --- over a restart of the gateway; its clocks begin anew


def restored(
    data: bytes | None, *, moment: float, now: float, open_runs: tuple[int, ...] = (), **changes: Any
) -> Breaker:
    circuits = breaker(**changes)
    assert data is not None
    circuits.load({"t.f": data}, open_runs, moment, now)
    return circuits


def test_a_tripped_task_stays_tripped_for_the_rest_of_its_pause() -> None:
    data = tripped().dump("t.f", 4.0, 1_000_004.0)
    circuits = restored(data, moment=500.0, now=1_000_007.0)
    assert circuits.next_trial(500.0) == pytest.approx(503.0)
    assert circuits.all_tripped(500.0)[0].cause == "run 3 died"


def test_crashes_before_the_restart_count() -> None:
    before = breaker()
    crash(before, 1, 2)
    circuits = restored(before.dump("t.f", 0.0, 1000.0), moment=7.0, now=1030.0)
    crash(circuits, 3, at=36.0)
    assert circuits.holds("t.f")
    circuits = restored(before.dump("t.f", 0.0, 1000.0), moment=7.0, now=1030.0)
    crash(circuits, 3, at=38.0)
    assert not circuits.holds("t.f"), "more than a minute after"


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_no_jump_of_the_wall_clock_holds_longer_than_the_pause(jump: float) -> None:
    data = tripped().dump("t.f", 0.0, 1000.0)
    circuits = restored(data, moment=50.0, now=1000.0 + jump)
    assert circuits.trials(60.0) == {"t.f"}
    circuits.trying("t.f", 9)
    crash(circuits, 9, at=60.0)
    assert circuits.next_trial(60.0) == 80.0


@pytest.mark.parametrize("known", [True, False])
def test_a_trial_goes_on_only_if_its_run_does(known: bool) -> None:
    before = tripped()
    before.trying("t.f", 7)
    data = before.dump("t.f", 20.0, 1020.0)
    circuits = restored(data, moment=0.0, now=1021.0, open_runs=(7,) if known else ())
    assert bool(circuits.trials(0.0)) != known


def test_what_the_settings_no_longer_watch_is_let_go() -> None:
    data = tripped().dump("t.f", 0.0, 1000.0)
    circuits = restored(data, moment=0.0, now=1000.0, exempt=["t.f"])
    assert not circuits.holds("t.f")
    assert circuits.dump("t.f", 0.0, 1000.0) is None
