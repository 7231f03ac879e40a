"""Runs given ahead: of quick tasks only, begun in their order, taken back when the process is busy after all."""

from __future__ import annotations

from gateway.pace import DEPTH, KNOWN, PATIENCE, QUICK, Paces
from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import Assigned, Cancel, Deadline, Finished, GivenBack, Start, Started, TakeBack
from tests.unit.gateway.test_book import Desk, submission


def quick(desk: Desk) -> None:
    """Let the book know that t.f is quick."""
    for _ in range(KNOWN):
        _, token = desk.start()
        desk.say(Finished(token=token, ending="returned", seconds=0.0001), at=5.001)
    desk.book.take()


def submitted(desk: Desk, number: int, **changes: object) -> list[RunRow]:
    runs = [desk.book.accept(submission(**changes), 5.0) for _ in range(number)]
    desk.book.claim(5.0)
    return runs


def started(desk: Desk) -> list[str]:
    """Return the tokens that were ordered to start in this round."""
    _, after = desk.book.take()
    return [order.token for _, order in after.orders if isinstance(order, Start)]


def test_a_task_is_quick_when_enough_is_known_of_it() -> None:
    paces = Paces()
    for _ in range(KNOWN):
        assert not paces.is_quick("t.f")
        paces.ended("t.f", QUICK / 5)
    assert paces.is_quick("t.f")
    assert not paces.is_quick("t.g")
    for _ in range(10):
        paces.ended("t.f", QUICK * 2)
    assert not paces.is_quick("t.f")


def test_a_process_has_as_many_as_it_can_do_in_a_round() -> None:
    paces = Paces()
    for seconds, depth in ((0.0, DEPTH), (0.004, 10)):
        for _ in range(60):
            paces.ended("t.f", seconds)
        assert paces.depth("t.f") == depth


def test_what_the_runner_says_of_the_time_counts_and_not_what_rounds_take() -> None:
    desk = Desk(runs=1_000)
    for _ in range(KNOWN):
        _, token = desk.start()
        desk.say(Finished(token=token, ending="returned", seconds=0.0001), at=6.0)
    assert desk.book._paces.is_quick("t.f")


def test_one_slow_run_makes_it_unknown_again() -> None:
    paces = Paces()
    for _ in range(2 * KNOWN):
        paces.ended("t.f", 0.0)
    paces.ended("t.f", 60.0)
    assert not paces.is_quick("t.f")


def test_what_is_not_known_to_be_quick_is_given_one_by_one() -> None:
    desk = Desk(runs=1_000)
    submitted(desk, 3)
    assert len(started(desk)) == 1


def test_quick_runs_are_given_ahead_in_their_order_as_many_as_may() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    runs = submitted(desk, DEPTH + 3)
    tokens = started(desk)
    assert [desk.book.attempts[token].run for token in tokens] == runs[:DEPTH]
    for token in tokens[:2]:
        desk.say(Started(token=token), Finished(token=token, ending="returned"))
    desk.book.claim(5.0)
    batch, after = desk.book.take()
    assert [run.status for run in runs[:2]] == [RunStatus.SUCCESSFUL] * 2
    assert len([order for _, order in after.orders if isinstance(order, Start)]) == 2
    assert batch.full
    assert not any(isinstance(message, Assigned) for message in after.control), "no news to the supervisor"


def test_a_process_of_one_run_gets_one() -> None:
    desk = Desk(runs=KNOWN + 1)
    quick(desk)
    submitted(desk, 3)
    assert len(started(desk)) == 1


def test_a_run_with_a_limit_of_time_waits_for_its_turn() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    submitted(desk, 3, timeout=9.0)
    assert len(started(desk)) == 1


def test_what_was_given_ahead_is_taken_back_from_a_process_that_is_busy() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    first, second, third = submitted(desk, 3)
    tokens = started(desk)
    desk.say(Started(token=tokens[0]))
    assert desk.book.next_look() == desk.book.moment + PATIENCE
    desk.book.moment += 2 * PATIENCE
    desk.book.claim(5.0)
    _, after = desk.book.take()
    ((runner, order),) = after.orders
    assert runner == "r1"
    assert isinstance(order, TakeBack)
    assert sorted(order.tokens) == sorted(tokens[1:])
    assert desk.book.next_look() is None
    desk.book.claim(5.0)
    assert desk.book.take()[1].orders == [], "it is asked once"
    desk.say(GivenBack(token=tokens[1]), GivenBack(token=tokens[2]))
    assert (second.status, second.attempt, second.counted) == (RunStatus.READY, 0, 0)
    assert len(desk.book.queues) == 2
    desk.say(Finished(token=tokens[0], ending="returned"))
    desk.book.claim(5.0)
    again = started(desk)
    assert [desk.book.attempts[token].run for token in again] == [second, third]
    assert first.status is RunStatus.SUCCESSFUL


def test_one_that_has_begun_before_it_was_asked_back_goes_on() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    submitted(desk, 2)
    tokens = started(desk)
    desk.book.moment += 2 * PATIENCE
    desk.book.claim(5.0)
    for token in tokens:
        desk.say(Started(token=token), Finished(token=token, ending="returned"))
    assert not desk.book.attempts


def test_cancelling_one_that_waits_never_ends_the_one_in_front_of_it() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    _, second, third = submitted(desk, 3)
    tokens = started(desk)
    desk.say(Started(token=tokens[0]))
    desk.book.cancel(second, 1.0, 5.0)
    desk.book.cancel(third, 1.0, 5.0)
    _, after = desk.book.take()
    assert [order for _, order in after.orders] == [
        TakeBack(tokens=[tokens[1]]),
        TakeBack(tokens=[tokens[2]]),
    ]
    assert not any(isinstance(message, Deadline) for message in after.control)
    desk.say(GivenBack(token=tokens[1]))
    assert second.status is RunStatus.CANCELLED
    desk.say(Finished(token=tokens[0], ending="returned"), Started(token=tokens[2]))
    _, after = desk.book.take()
    assert ("r1", Cancel(token=tokens[2])) in after.orders, "it began first: now it is asked to stop"


def test_what_waits_at_a_process_that_dies_has_not_happened() -> None:
    desk = Desk(runs=1_000)
    quick(desk)
    first, second = submitted(desk, 2)
    tokens = started(desk)
    desk.say(Started(token=tokens[0]))
    from taskkit.wire.messages import Cause

    desk.book.runner_exited("r1", Cause(kind="signal", signal="SIGSEGV"))
    desk.book.runner_drained("r1", 6.0)
    assert first.status is RunStatus.FAILED
    assert (second.status, second.counted) == (RunStatus.READY, 0)
    assert len(desk.book.queues) == 1
