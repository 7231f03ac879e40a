"""The lifecycle tables, exhausted."""

from __future__ import annotations

import itertools
import math

import pytest

from taskkit.errors import LifecycleError
from taskkit.lifecycle import (
    CRASH_BACKOFF,
    PROCESS_TRANSITIONS,
    QUARANTINE_AFTER,
    RUN_TRANSITIONS,
    TERMINAL,
    Ending,
    ProcessEvent,
    ProcessState,
    RunEvent,
    RunStatus,
    Verdict,
    next_process_state,
    next_run_status,
    verdict,
)

READY, RUNNING = RunStatus.READY, RunStatus.RUNNING
SUCCESSFUL, FAILED, CANCELLED = RunStatus.SUCCESSFUL, RunStatus.FAILED, RunStatus.CANCELLED

#: Written out a second time on purpose: whoever changes the table says so here.
RUN_MOVES = {
    (READY, RunEvent.START): RUNNING,
    (READY, RunEvent.CANCEL): CANCELLED,
    (READY, RunEvent.FAIL): FAILED,
    (RUNNING, RunEvent.SUCCEED): SUCCESSFUL,
    (RUNNING, RunEvent.FAIL): FAILED,
    (RUNNING, RunEvent.CANCEL): CANCELLED,
    (RUNNING, RunEvent.RETRY): READY,
    (RUNNING, RunEvent.PUT_BACK): READY,
}

PROCESS_MOVES = {
    (ProcessState.STARTING, ProcessEvent.READY): ProcessState.RUNNING,
    (ProcessState.STARTING, ProcessEvent.TERMINATE): ProcessState.STOPPING,
    (ProcessState.STARTING, ProcessEvent.EXIT): ProcessState.EXITED,
    (ProcessState.RUNNING, ProcessEvent.DRAIN): ProcessState.DRAINING,
    (ProcessState.RUNNING, ProcessEvent.TERMINATE): ProcessState.STOPPING,
    (ProcessState.RUNNING, ProcessEvent.EXIT): ProcessState.EXITED,
    (ProcessState.DRAINING, ProcessEvent.TERMINATE): ProcessState.STOPPING,
    (ProcessState.DRAINING, ProcessEvent.EXIT): ProcessState.EXITED,
    (ProcessState.STOPPING, ProcessEvent.EXIT): ProcessState.EXITED,
    (ProcessState.BACKOFF, ProcessEvent.START): ProcessState.STARTING,
    (ProcessState.BACKOFF, ProcessEvent.TERMINATE): ProcessState.EXITED,
    (ProcessState.EXITED, ProcessEvent.WAIT): ProcessState.BACKOFF,
    (ProcessState.EXITED, ProcessEvent.START): ProcessState.STARTING,
    (ProcessState.EXITED, ProcessEvent.GIVE_UP): ProcessState.FATAL,
    (ProcessState.FATAL, ProcessEvent.START): ProcessState.STARTING,
}


@pytest.mark.parametrize(("status", "event"), list(itertools.product(RunStatus, RunEvent)))
def test_every_event_in_every_run_status(status: RunStatus, event: RunEvent) -> None:
    expected = RUN_MOVES.get((status, event))
    if expected is not None:
        assert next_run_status(status, event) is expected
        return
    with pytest.raises(LifecycleError, match=f"{event.name}.*{status.value}"):
        next_run_status(status, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ProcessState, ProcessEvent)))
def test_every_event_in_every_process_state(state: ProcessState, event: ProcessEvent) -> None:
    expected = PROCESS_MOVES.get((state, event))
    if expected is not None:
        assert next_process_state(state, event) is expected
        return
    with pytest.raises(LifecycleError, match=f"{event.name}.*{state.value}"):
        next_process_state(state, event)


def test_the_tables_name_every_state() -> None:
    assert set(RUN_TRANSITIONS) == set(RunStatus)
    assert set(PROCESS_TRANSITIONS) == set(ProcessState)


def test_nothing_leads_out_of_a_terminal_status_or_is_a_dead_end_besides() -> None:
    assert {status for status, moves in RUN_TRANSITIONS.items() if not moves} == TERMINAL
    assert {status for status in RunStatus if status.is_terminal} == TERMINAL


def test_every_run_status_can_be_reached_from_ready() -> None:
    reached = {READY}
    for _ in RunStatus:
        reached |= {target for status in reached for target in RUN_TRANSITIONS[status].values()}
    assert reached == set(RunStatus)


def test_the_words_that_leave_the_process_are_for_ever() -> None:
    assert [status.value for status in RunStatus] == ["READY", "RUNNING", "SUCCESSFUL", "FAILED", "CANCELLED"]
    assert [ending.value for ending in Ending] == [
        "returned",
        "raised",
        "crashed",
        "timed_out",
        "cancelled",
        "lost",
    ]


ANY = (False, True)
SUCCEED, CANCEL, FAIL = Verdict(RunEvent.SUCCEED), Verdict(RunEvent.CANCEL), Verdict(RunEvent.FAIL)
PUT_BACK = Verdict(RunEvent.PUT_BACK)


@pytest.mark.parametrize("on_lost", ["retry", "fail"])
@pytest.mark.parametrize("left", ANY, ids=["last", "more"])
@pytest.mark.parametrize("cancelling", ANY, ids=["-", "cancelling"])
@pytest.mark.parametrize("retry_in", [None, 3.5])
@pytest.mark.parametrize("ending", Ending)
def test_verdict(ending: Ending, retry_in: float | None, cancelling: bool, left: bool, on_lost: str) -> None:
    """The whole table, in the order in which its rules apply."""
    found = verdict(
        ending,
        attempts=1,
        max_attempts=2 if left else 1,
        on_lost=on_lost,
        cancelling=cancelling,
        retry_in=retry_in,
    )
    if ending is Ending.RETURNED:
        assert found == SUCCEED, "what returned has succeeded, whoever wanted to stop it"
    elif cancelling or ending is Ending.CANCELLED:
        assert found == CANCEL
    elif ending is Ending.LOST:
        assert found == (PUT_BACK if on_lost == "retry" else FAIL), "a lost attempt is not counted"
    elif not left:
        assert found == FAIL
    elif ending is Ending.RAISED:
        assert found == (FAIL if retry_in is None else Verdict(RunEvent.RETRY, 3.5))
    else:
        assert found == Verdict(RunEvent.RETRY, CRASH_BACKOFF[0]), "a crash has no exception to look at"


@pytest.mark.parametrize("ending", [Ending.CRASHED, Ending.TIMED_OUT])
def test_the_delay_after_crashes_grows_up_to_its_last_value(ending: Ending) -> None:
    delays = [
        verdict(ending, attempts=n, max_attempts=99, on_lost="retry", cancelling=False).delay
        for n in range(1, 8)
    ]
    assert delays == [0.5, 2.0, 10.0, 60.0, 60.0, 60.0, 60.0]


@pytest.mark.parametrize("retry_in", [-1.0, math.nan, 0.0])
def test_a_senseless_delay_of_the_user_means_at_once(retry_in: float) -> None:
    found = verdict(
        Ending.RAISED, attempts=1, max_attempts=2, on_lost="retry", cancelling=False, retry_in=retry_in
    )
    assert found == Verdict(RunEvent.RETRY, 0.0)


def test_every_verdict_is_a_move_of_a_running_run() -> None:
    for ending, cancelling, on_lost, retry_in, attempts in itertools.product(
        Ending, ANY, ("retry", "fail"), (None, 1.0), (1, 2, 3)
    ):
        found = verdict(
            ending,
            attempts=attempts,
            max_attempts=2,
            on_lost=on_lost,
            cancelling=cancelling,
            retry_in=retry_in,
        )
        target = next_run_status(RUNNING, found.event)
        assert target is READY or found.delay == 0.0, "only a run that waits has something to wait for"


@pytest.mark.parametrize("max_attempts", [1, 3, 99])
@pytest.mark.parametrize("crashes", range(1, 5))
def test_a_run_that_killed_three_runners_is_tried_no_more(max_attempts: int, crashes: int) -> None:
    found = verdict(
        Ending.CRASHED,
        attempts=crashes,
        max_attempts=max_attempts,
        on_lost="retry",
        cancelling=False,
        crashes=crashes,
    )
    assert found.quarantined == (crashes >= QUARANTINE_AFTER)
    assert (found.event is RunEvent.FAIL) == (crashes >= min(QUARANTINE_AFTER, max_attempts))


@pytest.mark.parametrize("ending", [ending for ending in Ending if ending is not Ending.CRASHED])
def test_only_a_crash_brings_into_quarantine(ending: Ending) -> None:
    found = verdict(ending, attempts=1, max_attempts=9, on_lost="retry", cancelling=False, crashes=9)
    assert not found.quarantined


def test_who_wanted_it_to_stop_has_the_last_word() -> None:
    found = verdict(Ending.CRASHED, attempts=3, max_attempts=3, on_lost="retry", cancelling=True, crashes=3)
    assert found == Verdict(RunEvent.CANCEL)
