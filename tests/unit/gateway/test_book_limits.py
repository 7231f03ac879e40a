"""The book and limits of a run's time: who is asked to stop, who is listened to, who ends unstarted."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import Cancel, Cause, Deadline, Disarm, Event, Finished, RunnerSpec, TaskFailure
from tests.unit.gateway.test_book_crashes import Tree, last_event, together

RAISED = TaskFailure(exception="taskkit.errors.SoftTimeout", message="too slow")


def running(**limits: Any) -> tuple[Tree, RunRow, str, str]:
    """Return a run that has begun, with its runner and token; `tree.control` is what its beginning ordered."""
    tree = Tree()
    id = tree.runner()
    run = tree.accept(**limits)
    tree.begin(run)
    return tree, run, id, tree.place(run)[1]


def deadlines(tree: Tree) -> list[tuple[str, float]]:
    return [(order.kind, order.after) for order in tree.control if isinstance(order, Deadline)]


def test_limits_begin_with_the_attempt() -> None:
    tree, run, id, token = running(timeout=9.0, soft_timeout=5.0, cpu_timeout=3.0, stall_timeout=2.0)
    assert deadlines(tree) == [
        *(("timeout", 9.0), ("soft_timeout", 5.0)),
        *(("silence", 2.0), ("cpu_timeout", 3.0)),
    ]
    tree.say(id, Finished(token=token, ending="returned", result=b"1"))
    tree.round()
    assert Disarm(runner=id, token=token) in tree.control
    assert run.status is RunStatus.SUCCESSFUL


@pytest.mark.parametrize("failure", [None, RAISED], ids=["cancelled", "raised"])
def test_at_its_soft_timeout_it_is_asked_once_and_its_end_is_a_timeout(failure: TaskFailure | None) -> None:
    tree, run, id, token = running(soft_timeout=5.0)
    tree.book.expired(id, token, "soft_timeout", 6.0)
    tree.book.expired(id, token, "soft_timeout", 36.0)
    tree.round()
    assert tree.orders == [(id, Cancel(token=token, reason="soft_timeout"))]
    ending = "raised" if failure else "cancelled"
    tree.say(id, Finished(token=token, ending=ending, failure=failure))
    tree.round()
    error = last_event(tree, run)[1]["error"]
    assert (run.status, error["code"], error["cause"]["kind"]) == (
        RunStatus.FAILED,
        "timed_out",
        "soft_timeout",
    )
    assert error.get("exception") == (failure.exception if failure else None)


def test_what_is_raised_at_a_soft_timeout_is_retried_as_its_backoff_says() -> None:
    tree, run, id, token = running(soft_timeout=5.0, max_attempts=2)
    tree.book.expired(id, token, "soft_timeout", 6.0)
    tree.say(id, Finished(token=token, ending="raised", failure=RAISED, retry_in=7.0))
    tree.round()
    assert run.status is RunStatus.READY
    assert tree.book.queues.next_delayed() == 7.0
    tree, run, id, token = running(soft_timeout=5.0, max_attempts=2)
    tree.book.expired(id, token, "soft_timeout", 6.0)
    tree.say(id, Finished(token=token, ending="raised", failure=RAISED))
    tree.round()
    assert run.status is RunStatus.FAILED


def test_who_is_cancelled_already_is_not_asked_for_another_reason() -> None:
    tree, run, id, token = running(soft_timeout=5.0)
    tree.book.cancel(run, 10.0, 1.0)
    tree.round()
    tree.book.expired(id, token, "soft_timeout", 6.0)
    tree.round()
    assert tree.orders == []
    tree.say(id, Finished(token=token, ending="cancelled"))
    tree.round()
    assert run.status is RunStatus.CANCELLED


def test_one_that_speaks_is_listened_to_for_what_is_left() -> None:
    tree, _, id, token = running(stall_timeout=10.0)
    tree.round(8.0)
    tree.say(id, Event(token=token, type="step", data=b"{}"))
    tree.round(10.0)
    tree.book.expired(id, token, "silence", 10.0)
    tree.round()
    assert (tree.orders, deadlines(tree)) == ([], [("silence", 8.0)])
    tree.round(18.0)
    tree.book.expired(id, token, "silence", 18.0)
    tree.round()
    assert tree.orders == [(id, Cancel(token=token, reason="stall_timeout"))]
    assert deadlines(tree) == [("stall_timeout", 3.0)]


def test_a_silence_that_the_clock_of_deadlines_has_not_counted_is_none() -> None:
    """It said something, then nobody read what it says: the gateway's clock went on, the supervisor's did not."""
    tree, _, id, token = running(stall_timeout=10.0)
    tree.round(8.0)
    tree.say(id, Event(token=token, type="step", data=b"{}"))
    tree.round(500.0)
    tree.book.expired(id, token, "silence", 500.0)
    tree.round()
    assert (tree.orders, deadlines(tree)) == ([], [("silence", 1.0)])


def test_the_next_gateway_asks_again_and_takes_nobody_for_silent_at_once() -> None:
    tree, run, id, token = running(stall_timeout=10.0)
    tree.book.moment = 50.0
    later = Tree(tree.store, (id,))
    later.book.moment = 60.0
    later.book.runner_up(RunnerSpec(id=id), 1, 0.0, adopted=True)
    later.round()
    assert [order.at_most for order in later.control if isinstance(order, Deadline)] == [True]
    later.book.expired(id, token, "silence", 61.0)
    later.round()
    assert (later.orders, deadlines(later)) == ([], [("silence", 10.0)])
    later.book.expired(id, token, "silence", 71.0)
    later.round()
    last = Tree(later.store, (id,))
    last.book.runner_up(RunnerSpec(id=id), 1, 0.0, adopted=True)
    last.round()
    assert (id, Cancel(token=token, reason="stall_timeout")) in last.orders
    assert run.status is RunStatus.RUNNING


def test_in_a_shared_process_who_stays_silent_is_abandoned() -> None:
    tree = Tree()
    id, (run, other) = together(tree, 2, stall_timeout=5.0)
    token = tree.place(run)[1]
    tree.book.expired(id, token, "silence", 6.0)
    tree.round()
    assert tree.orders == [(id, Cancel(token=token, reason="stall_timeout"))]
    tree.book.expired(id, token, "stall_timeout", 9.0)
    tree.round()
    assert [run.status, other.status] == [RunStatus.FAILED, RunStatus.RUNNING]
    assert last_event(tree, run)[1]["error"]["cause"]["kind"] == "stall_timeout"


@pytest.mark.parametrize("kind", ["timeout", "cpu_timeout", "stall_timeout"])
def test_who_is_ended_from_outside_has_timed_out(kind: str) -> None:
    tree, run, id, _ = running(max_attempts=1)
    tree.die(id, Cause(kind=kind, signal="SIGKILL"))
    error = last_event(tree, run)[1]["error"]
    assert (run.status, error["code"], error["cause"]["kind"]) == (RunStatus.FAILED, "timed_out", kind)


def test_a_run_that_waits_too_long_ends_unstarted() -> None:
    tree = Tree()
    run = tree.accept(schedule_timeout=10.0)
    tree.round(9.9)
    assert run.status is RunStatus.READY
    tree.round(10.0)
    assert run.status is RunStatus.FAILED
    assert last_event(tree, run)[1]["error"]["code"] == "expired"
    assert not tree.book.runs


def test_one_that_was_given_to_a_runner_may_still_begin_but_waits_no_more_if_it_comes_back() -> None:
    tree = Tree()
    id = tree.runner()
    begun, back = tree.accept(schedule_timeout=10.0), tree.accept(schedule_timeout=10.0)
    other = tree.runner()
    tree.round()
    tree.round(11.0)
    assert [begun.status, back.status] == [RunStatus.READY] * 2
    where = {tree.place(run)[0]: run for run in (begun, back)}
    assert set(where) == {id, other}
    tree.die(tree.place(back)[0], Cause(kind="lost"))
    assert [begun.status, back.status] == [RunStatus.READY, RunStatus.FAILED]
    tree.begin(begun)
    tree.round(99.0)
    assert begun.status is RunStatus.RUNNING


def test_the_next_gateway_knows_who_waits_too_long() -> None:
    tree = Tree()
    run = tree.accept(schedule_timeout=10.0)
    tree.round()
    later = Tree(tree.store)
    later.round(10.0)
    assert run.no not in later.book.runs
