"""Limits per key: who passes its gate, when it opens again, what a takeover knows of it, what waiting costs."""

from __future__ import annotations

import dataclasses

import pytest

from gateway import throttle
from gateway.dispatch import Queues, pools_of
from gateway.store.rows import Batch, BegunRow, RunRow
from gateway.throttle import Limit, Throttle
from taskkit.lifecycle import RunStatus
from taskkit.rates import Rate, parse_rate
from taskkit.wire.messages import Finished, RunnerSpec, TaskFailure
from tests.unit.gateway.test_book_crashes import Tree

ONE = {"t": Limit(concurrency=1)}
TWO_IN_TEN = {"t": Limit(rate=Rate(2, 10.0))}


def run(no: int, key: str = "", *, task: str = "t", pool: str = "default", priority: int = 0) -> RunRow:
    return RunRow(no=no, id=f"run-{no}", task=task, concurrency_key=key, pool=pool, priority=priority)


def throttled(limits: dict[str, Limit]) -> Throttle:
    found = Throttle()
    found.use(limits, ())
    return found


def queued(limits: dict[str, Limit], *runs: RunRow) -> Queues:
    queues = Queues(throttled(limits))
    for one in runs:
        queues.add(one, 0.0)
    return queues


def take(queues: Queues, pool: str = "default") -> RunRow | None:
    """Take a run out and give it to a runner."""
    found = queues.take(pool, 0.0)
    if found is not None:
        queues.throttle.assigned(found)
    return found


def numbers(queues: Queues) -> list[int]:
    taken = []
    while (found := take(queues)) is not None:
        taken.append(found.no)
    return taken


# --- concurrency


def test_each_key_has_the_limit_to_itself_and_other_tasks_have_none() -> None:
    queues = queued(
        ONE, run(1, "a"), run(2, "a"), run(3, "b"), run(4), run(5), run(6, task="u"), run(7, task="u")
    )
    assert numbers(queues) == [1, 3, 4, 6, 7]
    assert len(queues) == 2


def test_an_end_lets_the_next_one_pass_the_oldest_first() -> None:
    runs = [run(no, "a") for no in range(1, 5)]
    queues = queued(ONE, *reversed(runs))
    assert numbers(queues) == [1]
    for no in (2, 3, 4):
        queues.throttle.ended(runs[no - 2], begun=False)
        queues.wake(0.0)
        assert numbers(queues) == [no]


def test_the_larger_priority_passes_first_although_it_came_last() -> None:
    queues = queued(ONE, run(1, "a"), run(2, "a"), run(3, "a", priority=1))
    assert numbers(queues) == [3]
    queues.add(run(4, "a", priority=2), 0.0)
    queues.throttle.ended(run(3, "a"), begun=True)
    queues.wake(0.0)
    assert numbers(queues) == [4]


def test_who_was_put_back_and_leaves_is_followed_by_the_next() -> None:
    queues = queued(ONE, *(run(no, "a") for no in range(1, 5)))
    assert numbers(queues) == [1]
    queues.throttle.ended(run(1, "a"), begun=True)
    queues.wake(0.0)
    queues.remove(2)  # somebody cancels it before a runner is free
    assert numbers(queues) == [3]


def test_a_gate_serves_every_pool_in_which_its_runs_wait() -> None:
    queues = queued({"t": Limit(concurrency=2)}, *(run(no, pool=pool) for no, pool in enumerate("aabb", 1)))
    for pool in "ab":
        assert take(queues, pool) is not None
    assert pools_of({"a": 9, "b": 9}, queues, 0.0) == []
    queues.throttle.ended(run(1), begun=True)
    queues.wake(0.0)
    assert pools_of({"a": 9, "b": 9}, queues, 0.0) == ["a", "b"]
    assert take(queues, "b") is not None
    assert pools_of({"a": 9, "b": 9}, queues, 0.0) == []


def test_a_held_task_is_tried_only_where_its_gate_is_open() -> None:
    queues = queued(ONE, run(1, "a"), run(2, "a"))
    queues.add(run(3, task="u"), 0.0)
    assert take(queues) is not None
    queues.hold("t")
    assert queues.take_alone("default", 0.0, ["t"]) is None
    queues.throttle.ended(run(1, "a"), begun=True)
    queues.wake(0.0)
    assert queues.waits_alone("default", 0.0, ["t"])
    found = queues.take_alone("default", 0.0, ["t"])
    assert found is not None
    assert found.no == 2


def test_limits_that_go_let_everybody_pass() -> None:
    queues = queued(ONE, *(run(no, "a") for no in range(1, 10)))
    assert numbers(queues) == [1]
    queues.throttle.use({}, [(run(1, "a"), True)])
    queues.wake(0.0)
    assert numbers(queues) == list(range(2, 10))


def test_limits_that_come_count_what_is_under_way() -> None:
    queues = queued({}, run(1, "a"), run(2, "a"), run(3, "b"))
    assert take(queues) is not None
    queues.throttle.use(ONE, [(run(1, "a"), True)])
    assert numbers(queues) == [3]
    queues.throttle.ended(run(1, "a"), begun=True)
    queues.wake(0.0)
    assert numbers(queues) == [2]


def test_ten_thousand_at_one_gate_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    admits = Throttle.admits

    def counted(self: Throttle, one: RunRow) -> bool:
        nonlocal looks
        looks += 1
        return admits(self, one)

    monkeypatch.setattr(Throttle, "admits", counted)
    queues = queued(ONE, *(run(no, "a") for no in range(1, 10_001)))
    assert numbers(queues) == [1]
    assert looks <= 10_001 + 1
    looks = 0
    for no in range(20_000, 21_000):
        queues.add(run(no, task="u"), 0.0)
        assert numbers(queues) == [no]
    assert looks <= 2_000, "the others do not pay for them"
    looks = 0
    for no in range(1, 1_000):
        queues.throttle.ended(run(no, "a"), begun=True)
        queues.wake(0.0)
        assert numbers(queues) == [no + 1]
    assert looks <= 3_000, "each end looks at the next one, not at all of them"


def test_keys_that_nobody_uses_are_forgotten() -> None:
    found = throttled({"t": Limit(concurrency=1, rate=Rate(1, 5.0))})
    for no in range(5_000):
        found.turn(no * 10.0)
        one = run(no, f"user-{no}")
        assert found.admits(one)
        found.assigned(one)
        found.begun(one, found.moment, no * 10.0, Batch())
        found.ended(one, begun=True)
    assert len(found._gates) < 2 * throttle._SWEEP


# --- rates


def begin(found: Throttle, one: RunRow, batch: Batch | None = None) -> None:
    assert found.admits(one)
    found.assigned(one)
    found.begun(one, found.moment, 1_000.0 + found.moment, Batch() if batch is None else batch)


def test_so_many_begin_in_any_such_time() -> None:
    found = throttled(TWO_IN_TEN)
    for moment in (0.0, 6.0):
        found.turn(moment)
        begin(found, run(1))
    for moment, opens in ((6.0, 10.0), (9.99, 10.0)):
        found.turn(moment)
        assert not found.admits(run(3))
        assert found.next() == opens
    assert found.turn(10.0) == {("t", "")}
    begin(found, run(3))
    assert not found.admits(run(4))
    assert found.next() == 16.0


def test_who_is_assigned_counts_until_it_has_begun_and_not_if_it_does_not() -> None:
    found = throttled(TWO_IN_TEN)
    for no in (1, 2):
        found.assigned(run(no))
    found.turn(1_000.0)
    assert not found.admits(run(3)), "nobody knows when these begin"
    assert found.next() is None
    found.ended(run(1), begun=False)
    assert found.turn(1_000.0) == {("t", "")}
    assert found.admits(run(3))


def test_a_run_waits_aside_until_the_time_is_over() -> None:
    queues = queued(TWO_IN_TEN, *(run(no) for no in range(1, 6)), run(9, task="u"))
    found = queues.throttle
    for _ in range(3):
        one = take(queues)
        assert one is not None
        found.begun(one, found.moment, 0.0, Batch())
    assert one.no == 9
    assert take(queues) is None
    assert found.next() == 10.0
    queues.wake(10.0)
    assert numbers(queues) == [3, 4]


def test_a_takeover_counts_what_began_before_and_is_never_less_strict() -> None:
    before, batch = throttled(TWO_IN_TEN), Batch()
    for moment in (0.0, 6.0):
        before.turn(moment)
        begin(before, run(1), batch)
    assert batch.full
    assert [(row.at, row.until) for row in batch.begun] == [(1_000.0, 1_010.0), (1_006.0, 1_016.0)]
    for now, wait in ((1_008.0, 2.0), (900.0, 10.0), (1_012.0, None)):  # in time, set back, when one is over
        found = Throttle(batch.begun, 50.0, now)
        found.use(TWO_IN_TEN, ())
        assert found.admits(run(3)) == (wait is None)
        assert found.next() == (None if wait is None else 50.0 + wait)


def test_an_attempt_found_open_counts_as_what_it_is() -> None:
    found = Throttle([BegunRow("t", "", 5.0, 15.0)], 0.0, 6.0)
    found.use({"t": Limit(3, Rate(2, 10.0))}, [(run(1), True)])
    assert found.admits(run(2))
    found.use({"t": Limit(3, Rate(2, 10.0))}, [(run(1), True), (run(2), False)])
    assert not found.admits(run(3))
    found.use({"t": Limit(1, None)}, [(run(1), True)])
    assert not found.admits(run(3))


def test_what_is_out_of_date_leaves_the_store() -> None:
    found, batch = throttled(TWO_IN_TEN), Batch()
    for no in range(throttle._SWEEP):
        found.turn(no * 6.0)
        begin(found, run(no), batch)
    assert batch.begun_before == 1_000.0 + found.moment
    after, batch = Throttle(batch.begun, 0.0, 9e9), Batch()
    after.use(TWO_IN_TEN, ())
    begin(after, run(1), batch)
    assert batch.begun_before is not None, "no gateway lives for so long"


def test_more_than_can_be_remembered_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MOST", 2)
    found = throttled(TWO_IN_TEN)
    for key in "ab":
        begin(found, run(1, key))
    assert not found.admits(run(3, "c"))
    assert found.next() == 1.0
    found.turn(10.0)
    assert found.admits(run(3, "c"))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10/s", (10, 1.0)),
        ("100/m", (100, 60.0)),
        ("1/h", (1, 3600.0)),
        ("5/d", (5, 86400.0)),
        ("3/30s", (3, 30.0)),
    ],
)
def test_rates_are_written_as_people_say_them(text: str, rate: tuple[int, float]) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "10", "10/", "0/s", "10/0s", "10001/s", "1/2d", "1/s ", "-1/s", "1.5/s"]
)
def test_anything_else_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a number per time|it may be"):
        parse_rate(text)


def test_a_row_says_which_key_it_has() -> None:
    assert throttle.gate_of(dataclasses.replace(run(1), concurrency_key="k")) == ("t", "k")


# --- the book


def test_a_run_between_two_attempts_holds_no_place_and_a_crash_frees_it() -> None:
    tree = Tree()
    tree.book.throttled({"t.f": Limit(concurrency=1)})
    first, second, third = (tree.accept(max_attempts=3) for _ in range(3))
    id, _ = tree.runner(), tree.runner()
    tree.begin(first)
    assert second.no in tree.book.queues._waiting
    tree.say(
        id,
        Finished(
            token=tree.place(first)[1], ending="raised", failure=TaskFailure(exception="E"), retry_in=60.0
        ),
    )
    tree.round()
    tree.begin(second)
    tree.round(61.0)
    assert first.status is RunStatus.READY, "its time has come, its place is taken"
    tree.die(tree.place(second)[0])
    tree.runner()
    tree.begin(first)
    assert third.no in tree.book.queues._waiting


def test_a_run_that_is_cancelled_keeps_its_place_until_it_has_stopped() -> None:
    tree = Tree()
    tree.book.throttled({"t.f": Limit(concurrency=1)})
    first, second = tree.accept(), tree.accept()
    id, _ = tree.runner(), tree.runner()
    tree.begin(first)
    tree.book.cancel(first, 3.0, 0.0)
    tree.round()
    assert second.no in tree.book.queues._waiting
    tree.say(id, Finished(token=tree.place(first)[1], ending="cancelled"))
    tree.round()
    assert tree.place(second)


def test_the_gateway_that_takes_over_knows_the_places_that_are_taken() -> None:
    tree = Tree()
    tree.book.throttled({"t.f": Limit(concurrency=1)})
    first, second = tree.accept(), tree.accept()
    id = tree.runner()
    tree.begin(first)
    after = Tree(tree.store, (id,))
    after.book.throttled({"t.f": Limit(concurrency=1)})
    after.made = tree.made
    after.book.runner_up(RunnerSpec(id=id), 1, 0.0, adopted=True)
    other = after.runner()
    after.round()
    assert not after.book.runners[other].tokens
    after.die(id)
    after.round()
    assert {attempt.run.no for attempt in after.book.attempts.values()} == {second.no}


def test_a_beginning_counts_from_when_it_is_heard_not_from_the_last_round() -> None:
    found = throttled({"t": Limit(rate=Rate(1, 10.0))})
    found.turn(0.0)
    found.assigned(run(1))
    found.begun(
        run(1), 4.0, 1_004.0, Batch()
    )  # its process took four seconds to begin; nothing else happened
    found.turn(13.0)
    assert not found.admits(run(2))
    found.turn(14.0)
    assert found.admits(run(2))
