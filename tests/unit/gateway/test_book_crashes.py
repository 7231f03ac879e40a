"""The book and runs that kill their processes: quarantine, tasks on trial, culprits, what is abandoned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.book import Book
from gateway.store.rows import Opened, RunRow
from taskkit.lifecycle import RunStatus
from taskkit.settings import BreakerSettings, LimitSettings, PoolSettings, Settings
from taskkit.wire.messages import (
    Assigned,
    Cancel,
    Cause,
    Deadline,
    Disarm,
    Event,
    Finished,
    Hello,
    Kill,
    Retire,
    RunnerSpec,
    Start,
    Started,
    TaskFailure,
)
from tests.unit.gateway.test_book import ModelStore, submission

SETTINGS = Settings(
    pools={
        "default": PoolSettings(runners=4),
        "shared": PoolSettings(runners=8, concurrency=4, runs=100),
    },
    limits=LimitSettings(cancel_grace_seconds=3.0, kill_grace_seconds=1.5),
    breaker=BreakerSettings(crashes=2, pause=10.0, longest_pause=40.0),
)
SEGV = Cause(kind="signal", signal="SIGSEGV", detail="the process died of SIGSEGV")


def shared_spec(id: str) -> RunnerSpec:
    return RunnerSpec(id=id, pool="shared", concurrency=4, runs=100)


class Tree:
    """A book with runners that are played by hand; every round is committed."""

    def __init__(self, store: ModelStore | None = None, alive: tuple[str, ...] = ()) -> None:
        self.store = store or ModelStore()
        self.book = Book(SETTINGS, self.store.open(), alive, 0.0, 0.0)
        self.seqs: dict[str, int] = {}
        self.made = 0
        self.control: list[Any] = []
        self.orders: list[Any] = []

    def round(self, moment: float | None = None) -> None:
        if moment is not None:
            self.book.moment = moment
        self.book.claim(self.book.moment)
        batch, after = self.book.take()
        self.store.commit(batch)
        self.control, self.orders = after.control, after.orders

    def runner(self, pool: str = "default") -> str:
        """Return a new runner that has said hello."""
        self.made += 1
        id = f"r{self.made}"
        spec = shared_spec(id) if pool == "shared" else RunnerSpec(id=id, pool=pool)
        self.book.runner_up(spec, self.made, 0.0, adopted=False)
        self.say(id, Hello(runner=id, pid=self.made))
        return id

    def say(self, id: str, *messages: Any) -> None:
        for message in messages:
            self.seqs[id] = self.seqs.get(id, 0) + 1
            self.book.frame(self.book.runners[id], self.seqs[id], message, self.book.moment)

    def accept(self, **changes: Any) -> RunRow:
        return self.book.accept(submission(**changes), self.book.moment)

    def place(self, run: RunRow) -> tuple[str, str]:
        """Return (runner, token) of a run's open attempt."""
        (found,) = [attempt for attempt in self.book.attempts.values() if attempt.run is run]
        return found.row.runner, found.row.token

    def begin(self, *runs: RunRow) -> None:
        """Claim, and have these runs start where they were given to."""
        self.round()
        for run in runs:
            id, token = self.place(run)
            self.say(id, Started(token=token))
        self.round()

    def die(self, id: str, cause: Cause = SEGV) -> None:
        self.book.runner_exited(id, cause)
        self.book.runner_drained(id, self.book.moment)
        self.round()

    def crash(self, run: RunRow) -> None:
        """Give a waiting run a fresh runner, and have it kill that."""
        self.runner(run.pool)
        self.begin(run)
        self.die(self.place(run)[0])


def last_event(tree: Tree, run: RunRow) -> tuple[str, dict[str, Any]]:
    event = tree.store.events[run.no][-1]
    return event.type, json.loads(event.data)


# --- quarantine


def test_a_run_that_kills_three_runners_is_quarantined_whatever_it_may_still_try() -> None:
    tree = Tree()
    run = tree.accept(max_attempts=9, name="t.poison")
    for crashes, delay in ((1, 0.5), (2, 2.0), (3, None)):
        tree.crash(run)
        assert run.crashes == crashes
        if delay is not None:
            assert run.status is RunStatus.READY
            assert run.run_after == tree.book.moment + delay
            tree.round(tree.book.moment + 5.0)
    assert run.status is RunStatus.FAILED
    name, data = last_event(tree, run)
    assert name == "stream.end"
    assert data["error"]["code"] == "quarantined"
    assert data["error"]["crashes"] == 3
    assert data["error"]["cause"]["signal"] == "SIGSEGV"
    assert f"bulkhead release {run.id}" in data["error"]["message"]
    assert run.id in tree.book.casualties.notes()[0]


@pytest.mark.parametrize("kind", ["operator", "stopped", "lost", "boot", "timeout"])
def test_what_is_not_its_fault_brings_no_run_into_quarantine(kind: str) -> None:
    tree = Tree()
    run = tree.accept(max_attempts=99)
    for _ in range(5):
        tree.runner()
        tree.round(tree.book.moment + 100.0)
        tree.begin(run)
        tree.die(tree.place(run)[0], Cause(kind=kind))
        assert run.status is RunStatus.READY
    assert run.crashes == 0


def test_a_restarted_gateway_counts_on() -> None:
    tree = Tree()
    run = tree.accept(max_attempts=9)
    for _ in range(2):
        tree.crash(run)
        tree.round(tree.book.moment + 5.0)
    later = Tree(tree.store)
    again = later.book.runs[run.no]
    later.round(1000.0)
    later.made = 7
    later.crash(again)
    assert (again.status, again.crashes) == (RunStatus.FAILED, 3)
    assert run.id in "".join(Tree(later.store).book.casualties.notes())


def test_a_replay_takes_its_run_off_the_list() -> None:
    tree = Tree()
    run = tree.accept(max_attempts=9)
    for _ in range(3):
        tree.crash(run)
        tree.round(tree.book.moment + 5.0)
    assert tree.book.casualties.notes()
    made = tree.accept(replay_of=run.id)
    assert made.replay_of == run.id
    assert tree.book.casualties.notes() == []


# --- a task that keeps crashing


def trip(tree: Tree) -> None:
    for _ in range(2):
        tree.crash(tree.accept())


def test_a_tripped_task_waits_while_others_of_the_pool_go_on() -> None:
    tree = Tree()
    trip(tree)
    held, other = tree.accept(priority=9), tree.accept(name="t.other")
    tree.runner()
    tree.runner()
    tree.round(9.9)
    tree.place(other)
    assert held.status is RunStatus.READY
    assert [attempt.run for attempt in tree.book.attempts.values()] == [other]
    assert tree.book.casualties.next_trial(9.9) == 10.0


def test_one_is_tried_and_its_success_lets_the_others_go() -> None:
    tree = Tree()
    trip(tree)
    first, second = tree.accept(), tree.accept()
    for _ in range(3):
        tree.runner()
    tree.round(10.0)
    id, token = tree.place(first)
    assert len(tree.book.attempts) == 1
    tree.say(id, Started(token=token), Finished(token=token, ending="returned"))
    tree.round()
    tree.place(second)
    assert tree.store.breakers == {}


def test_a_trial_that_crashes_waits_twice_as_long() -> None:
    tree = Tree()
    trip(tree)
    first, second = tree.accept(), tree.accept()
    tree.runner()
    tree.round(10.0)
    tree.begin(first)
    tree.die(tree.place(first)[0])
    tree.runner()
    tree.round(29.9)
    assert not tree.book.attempts
    tree.round(30.0)
    tree.place(second)


def test_a_trial_whose_runner_never_began_leaves_the_next_one_a_try() -> None:
    tree = Tree()
    trip(tree)
    run = tree.accept()
    id = tree.runner()
    tree.round(10.0)
    tree.place(run)
    tree.die(id)
    tree.runner()
    tree.round()
    tree.place(run)


def test_a_held_run_can_be_cancelled() -> None:
    tree = Tree()
    trip(tree)
    run = tree.accept()
    tree.book.cancel(run, 1.0, 1.0)
    assert run.status is RunStatus.CANCELLED


def test_a_restarted_gateway_holds_on() -> None:
    tree = Tree()
    trip(tree)
    held = tree.accept()
    tree.round()
    later = Tree(tree.store)
    later.made = 9
    later.runner()
    later.round(9.9)
    assert not later.book.attempts
    later.round(10.1)
    assert [attempt.run.no for attempt in later.book.attempts.values()] == [held.no]


def test_a_run_on_trial_in_a_shared_pool_is_alone() -> None:
    tree = Tree()
    trip(tree)
    tree.accept(pool="shared")
    other = tree.accept(pool="shared", name="t.other")
    id = tree.runner("shared")
    tree.round(10.0)
    assert len(tree.book.runners[id].tokens) == 1
    assert tree.book.runners[id].retiring
    assert other.no in tree.book.queues._waiting


# --- culprits in shared processes


def together(tree: Tree, count: int, **changes: Any) -> tuple[str, list[RunRow]]:
    """Return a shared runner with that many runs at work in it."""
    id = tree.runner("shared")
    runs = [tree.accept(pool="shared", **changes) for _ in range(count)]
    tree.begin(*runs)
    assert {tree.place(run)[0] for run in runs} == {id}
    return id, runs


def test_of_several_nobody_crashed_but_each_is_lost_and_performed_again_alone() -> None:
    tree = Tree()
    id, runs = together(tree, 3)
    tree.die(id)
    for run in runs:
        assert (run.status, run.crashes, run.counted, run.suspect) == (RunStatus.READY, 0, 0, True)
        name, data = last_event(tree, run)
        assert (name, data["ending"]) == ("run.retrying", "lost")
        assert "3 runs shared the process" in data["error"]["message"]
        assert data["error"]["cause"]["signal"] == "SIGSEGV"
    fresh = [tree.runner("shared") for _ in range(2)]
    bystander = tree.accept(pool="shared", name="t.other")
    tree.round()
    assert sorted(tree.place(run)[0] for run in runs[:2]) == sorted(fresh), "each has a process for itself"
    assert bystander.no in tree.book.queues._waiting
    for id in fresh:
        assert (id, Retire()) in tree.orders
        assert Assigned(runner=id, last=True) in tree.control
        first = next(order for runner, order in tree.orders if runner == id)
        assert isinstance(first, Start), "before the word to leave"


def test_alone_it_crashes_on_its_own_account() -> None:
    tree = Tree()
    id, (run, other) = together(tree, 2)
    tree.die(id)
    tree.crash(run)
    assert (run.status, run.crashes) == (RunStatus.FAILED, 1)
    assert last_event(tree, run)[1]["error"]["code"] == "crashed"
    assert other.status is RunStatus.READY


def test_on_lost_decides_for_each() -> None:
    tree = Tree()
    id, runs = together(tree, 2, on_lost="fail")
    tree.die(id)
    assert [run.status for run in runs] == [RunStatus.FAILED] * 2
    assert [last_event(tree, run)[1]["error"]["code"] for run in runs] == ["lost"] * 2


def test_the_only_run_of_a_shared_process_is_the_culprit() -> None:
    tree = Tree()
    id = tree.runner("shared")
    run, waiting = tree.accept(pool="shared"), tree.accept(pool="shared")
    tree.begin(run)
    assert tree.place(waiting)[0] == id, "ordered, but it has not begun"
    tree.die(id)
    assert (run.status, run.crashes) == (RunStatus.FAILED, 1)
    assert (waiting.status, waiting.suspect, waiting.attempt) == (RunStatus.READY, False, 0)


def test_suspects_are_known_to_the_next_gateway() -> None:
    tree = Tree()
    id, runs = together(tree, 2)
    tree.die(id)
    later = Tree(tree.store)
    later.made = 5
    for _ in range(2):
        later.runner("shared")
    later.round()
    assert len({attempt.row.runner for attempt in later.book.attempts.values()}) == 2
    assert all(later.book.runs[run.no].suspect for run in runs)


def test_an_adopted_suspect_stays_alone() -> None:
    tree = Tree()
    id, runs = together(tree, 2)
    tree.die(id)
    alone = tree.runner("shared")
    tree.begin(runs[0])
    later = Tree(tree.store, (alone,))
    runner = later.book.runner_up(shared_spec(alone), 1, 0.0, adopted=True)
    later.accept(pool="shared", name="t.other")
    later.round()
    assert len(runner.tokens) == 1


def test_if_every_process_is_at_work_one_makes_way_for_a_suspect() -> None:
    tree = Tree()
    id, suspects = together(tree, 2)
    tree.die(id)
    for run in suspects[1:]:
        tree.book.cancel(run, 1.0, 0.0)
    busy = [tree.runner("shared") for _ in range(2)]  # all that the pool has, 8 / 4
    tree.book.queues.hold("t.f")
    others = [tree.accept(pool="shared", name="t.other") for _ in range(3)]
    tree.begin(*others)
    tree.book.queues.let_go("t.f")
    tree.round()
    (sent,) = [runner for runner, order in tree.orders if isinstance(order, Retire)]
    assert sent in busy
    assert len(tree.book.runners[sent].tokens) == 1, "the one with less to do"
    tree.round()
    assert not tree.orders, "once"
    fresh = tree.runner("shared")
    tree.round()
    assert tree.place(suspects[0])[0] == fresh


# --- deadlines in shared processes


def test_an_overdue_attempt_is_asked_to_stop_and_its_end_is_a_timeout() -> None:
    tree = Tree()
    id, (run, other) = together(tree, 2, timeout=5.0)
    token = tree.place(run)[1]
    tree.book.expired(id, token, "timeout", 6.0)
    tree.round()
    assert tree.orders == [(id, Cancel(token=token, reason="timeout"))]
    assert [run.status, other.status] == [RunStatus.RUNNING] * 2
    tree.say(id, Finished(token=token, ending="cancelled"))
    tree.round()
    assert [run.status, other.status] == [RunStatus.FAILED, RunStatus.RUNNING]
    error = last_event(tree, run)[1]["error"]
    assert (error["code"], error["cause"]["kind"]) == ("timed_out", "timeout")
    assert not tree.book.runners[id].retiring


def test_the_next_gateway_knows_that_it_was_asked() -> None:
    tree = Tree()
    id, (run, _) = together(tree, 2, timeout=5.0)
    token = tree.place(run)[1]
    tree.book.expired(id, token, "timeout", 6.0)
    tree.round()
    later = Tree(tree.store, (id,))
    later.book.runner_up(shared_spec(id), 1, 0.0, adopted=True)
    later.seqs[id] = tree.seqs[id]
    later.round()
    assert (id, Cancel(token=token, reason="timeout")) in later.orders
    later.say(id, Finished(token=token, ending="cancelled"))
    assert json.loads(later.book.batch.changed[run.no].error or b"{}")["code"] == "timed_out"


def test_an_overdue_attempt_that_returns_all_the_same_has_returned() -> None:
    tree = Tree()
    id, (run, _) = together(tree, 2, timeout=5.0)
    token = tree.place(run)[1]
    tree.book.expired(id, token, "timeout", 6.0)
    tree.say(id, Finished(token=token, ending="returned", result=b"7"))
    tree.round()
    assert (run.status, run.result) == (RunStatus.SUCCESSFUL, b"7")


@pytest.mark.parametrize("kind", ["timeout", "cancelled"])
def test_what_does_not_stop_is_abandoned_and_its_neighbours_are_not(kind: str) -> None:
    tree = Tree()
    id, (run, other) = together(tree, 2, timeout=5.0)
    token, neighbour = tree.place(run)[1], tree.place(other)[1]
    if kind == "cancelled":
        tree.book.cancel(run, 1.0, 5.0)
    else:
        tree.book.expired(id, token, kind, 6.0)
    tree.round()
    tree.book.expired(id, token, kind, 7.0)
    tree.round()
    expected = RunStatus.FAILED if kind == "timeout" else RunStatus.CANCELLED
    assert run.status is expected
    assert last_event(tree, run)[1]["error"]["cause"]["kind"] == kind
    assert (id, Retire()) in tree.orders
    assert Assigned(runner=id, last=True) in tree.control
    assert Disarm(runner=id, token=token) in tree.control
    assert not [message for message in tree.control if isinstance(message, Kill)]

    tail = run.tail
    tree.say(id, Event(token=token, type="late", data=b"{}"), Finished(token=token, ending="returned"))
    assert (run.tail, run.status) == (tail, expected), "it is fenced"
    tree.say(
        id, Event(token=neighbour, type="tick", data=b"{}"), Finished(token=neighbour, ending="returned")
    )
    tree.round()
    assert other.status is RunStatus.SUCCESSFUL
    limits = [message for message in tree.control if isinstance(message, Deadline)]
    assert limits == [Deadline(runner=id, token="", kind="abandoned", after=1.5, grace=1.5)]


def test_a_crash_of_what_was_abandoned_is_not_the_last_neighbours() -> None:
    tree = Tree()
    id, (run, other) = together(tree, 2)
    tree.book.cancel(run, 0.0, 5.0)
    tree.book.expired(id, tree.place(run)[1], "cancelled", 6.0)
    tree.die(id)
    assert (other.status, other.crashes, other.suspect) == (RunStatus.READY, 0, True)


def test_an_attempt_that_never_began_in_time_is_put_back() -> None:
    """The loop of its process is stuck in somebody's blocking call: that is not its fault."""
    tree = Tree()
    id = tree.runner("shared")
    run = tree.accept(pool="shared", timeout=5.0)
    tree.round()
    token = tree.place(run)[1]
    tree.book.expired(id, token, "timeout", 20.0)
    tree.round()
    assert (run.status, run.attempt, run.counted) == (RunStatus.READY, 0, 0)
    assert (id, Cancel(token=token, reason="timeout")) in tree.orders, "if it begins after all"


def test_a_deadline_of_what_has_ended_is_taken_back() -> None:
    tree = Tree()
    tree.book.expired("r1", "gone", "timeout", 1.0)
    assert tree.book.after.control == [Disarm(runner="r1", token="gone")]


# --- the operator


def test_a_runner_that_an_operator_ends_loses_its_run_uncounted() -> None:
    tree = Tree()
    id = tree.runner()
    run = tree.accept()
    tree.begin(run)
    tree.book.end_runner(id, "operator", "")
    tree.round()
    assert Kill(runner=id, kind="operator") in tree.control
    tree.die(id, Cause(kind="operator", detail="an operator ended the runner"))
    assert (run.status, run.counted, run.crashes) == (RunStatus.READY, 0, 0)


def test_a_drained_runner_gets_nothing_more() -> None:
    tree = Tree()
    id = tree.runner("shared")
    tree.book.drain_runner(id)
    run = tree.accept(pool="shared")
    tree.round()
    assert not tree.book.attempts
    assert run.no in tree.book.queues._waiting
    assert (id, Retire()) in tree.orders
    assert Deadline(runner=id, token="", kind="abandoned", after=1.5, grace=1.5) in tree.control


# --- memory


def test_a_memory_error_tells_the_limit_that_it_met() -> None:
    tree = Tree()
    tree.book.memory_limits = {"t.f": 1 << 20}
    id = tree.runner()
    run = tree.accept()
    tree.begin(run)
    failure = TaskFailure(exception="builtins.MemoryError")
    tree.say(id, Finished(token=tree.place(run)[1], ending="raised", failure=failure))
    tree.round()
    error = last_event(tree, run)[1]["error"]
    assert error["code"] == "raised"
    assert "1048576 bytes of address space" in error["message"]


def test_an_empty_store_opens() -> None:
    book = Book(SETTINGS, Opened({}, [], {}, 1, 1), [], 0.0)
    assert book.casualties.notes() == []
