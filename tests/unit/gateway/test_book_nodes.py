"""Runs that come from a dead node, or are another node's by now, as the book decides on them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.book import EPOCHS, Book
from gateway.state import After
from gateway.store.rows import Batch, Opened, RunRow
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import (
    Cancel,
    Finished,
    Hello,
    Kill,
    Order,
    RunnerSpec,
    Start,
    Started,
    Taken,
)
from tests.unit.gateway.test_book import SETTINGS, submission


class Desk:
    """A book without a store: what it plans is looked at."""

    def __init__(self) -> None:
        self.book = Book(SETTINGS, Opened({}, [], {}, 1, 1), [], 0.0)
        self._seq: dict[str, int] = {}

    def runner(self, id: str, pool: str = "default") -> None:
        chosen = SETTINGS.all_pools[pool]
        spec = RunnerSpec(id=id, pool=pool, runs=chosen.runs, concurrency=chosen.concurrency)
        self.book.runner_up(spec, 7, 0.0, adopted=False)
        self.say(id, Hello(runner=id, pid=7))

    def say(self, id: str, message: Any) -> None:
        self._seq[id] = self._seq.get(id, 0) + 1
        self.book.frame(self.book.runners[id], self._seq[id], message, 1.0)

    def started(self, run: RunRow) -> str:
        """Have a run begin; return the token of its attempt."""
        self.book.claim(1.0)
        (token,) = [token for token, one in self.book.attempts.items() if one.run is run]
        self.say(self.book.attempts[token].row.runner, Started(token=token))
        self.book.take()
        return token

    def disowned(self, run: RunRow) -> tuple[Batch, After]:
        self.book.disown(run, 2.0)
        return self.book.take()


@pytest.fixture
def desk() -> Desk:
    return Desk()


def orders(after: After, kind: type[Order]) -> list[Any]:
    return [order for _, order in after.orders if isinstance(order, kind)]


def events(batch: Batch) -> list[tuple[str, dict[str, Any]]]:
    return [(row.type, json.loads(row.data)) for row in batch.events]


def taken(**fields: Any) -> Taken:
    known = {
        "node": "n1",
        "moves": 1,
        "version": 7,
        "attempt": 2,
        "counted": 1,
        "began": True,
        "runner": "r9",
    }
    return Taken(**{**known, **fields})


def test_a_run_of_a_dead_node_counts_on_in_an_epoch_of_its_own(desk: Desk) -> None:
    run = desk.book.accept(
        submission(fence="f2", taken=taken(crashes=1, created_at=5.0, started_at=6.0)), 9.0
    )
    assert (run.fence, run.version, run.attempt, run.counted, run.crashes) == ("f2", 8, 2, 1, 1)
    assert (run.epoch, run.created_at, run.started_at, run.status) == (EPOCHS, 5.0, 6.0, RunStatus.READY)
    batch, _ = desk.book.take()
    ((type, data),) = events(batch)
    assert (type, data["attempt"], data["ending"]) == ("run.retrying", 2, "lost")
    assert json.loads(run.failure or b"")["code"] == "lost"
    desk.runner("r1")
    token = desk.started(run)
    assert desk.book.attempts[token].row.number == 3


def test_one_that_had_not_begun_as_far_as_is_known_waits_as_if_new(desk: Desk) -> None:
    run = desk.book.accept(submission(fence="f2", taken=taken(attempt=0, counted=0, began=False)), 9.0)
    batch, _ = desk.book.take()
    assert (batch.events, run.failure, run.attempt) == ([], None, 0)
    assert len(desk.book.queues) == 1


@pytest.mark.parametrize("began", [True, False])
def test_what_must_not_be_done_twice_has_failed(desk: Desk, began: bool) -> None:
    run = desk.book.accept(submission(fence="f2", on_lost="fail", taken=taken(began=began)), 9.0)
    batch, after = desk.book.take()
    ((type, data),) = events(batch)
    assert (type, data["status"], data["error"]["code"]) == ("stream.end", "FAILED", "lost")
    assert ("not known" in data["error"]["message"]) is not began
    assert (batch.ends, after.ended, run.status) == ([run.no], [run.no], RunStatus.FAILED)
    assert len(desk.book.queues) == 0


def test_a_run_that_was_lost_again_and_again_waits_longer(desk: Desk) -> None:
    run = desk.book.accept(submission(taken=taken(attempt=4, counted=0)), 9.0)
    assert run.run_after is not None
    assert run.run_after > 9.0


def test_every_copy_has_a_fence_of_its_own(desk: Desk) -> None:
    first, second = (desk.book.accept(submission(), 9.0) for _ in range(2))
    assert first.fence
    assert first.fence != second.fence


def test_a_waiting_copy_goes_without_a_word(desk: Desk) -> None:
    run = desk.book.accept(submission(), 1.0)
    id = run.id
    desk.book.take()
    batch, after = desk.disowned(run)
    assert (batch.events, batch.ends, after.ended) == ([], [], [run.no])
    assert batch.renamed == {run.no: f"{id}~{run.no}"}
    assert (batch.changed[run.no].status, batch.told) == (RunStatus.CANCELLED, {run.no: run.version})
    assert not desk.book.has_ended(id)
    assert desk.book.find(id) is None
    assert run.no not in desk.book.untold
    assert len(desk.book.queues) == 0
    desk.book.accept(submission(id=id), 3.0)
    assert desk.book.find(id) is not None, "it may come back"


def test_the_process_of_a_running_copy_is_ended_and_its_last_words_are_void(desk: Desk) -> None:
    desk.runner("r1")
    run = desk.book.accept(submission(), 1.0)
    token = desk.started(run)
    batch, after = desk.disowned(run)
    assert [message.runner for message in after.control if isinstance(message, Kill)] == ["r1"]
    assert [row.ending for row in batch.changed_attempts] == ["lost"]
    desk.say("r1", Finished(token=token, ending="returned", result=b"1"))
    batch, _ = desk.book.take()
    assert (batch.events, batch.ends) == ([], [])


def test_others_in_its_process_go_on(desk: Desk) -> None:
    desk.runner("r1", "shared")
    mine, other = (desk.book.accept(submission(pool="shared"), 1.0) for _ in range(2))
    token, kept = desk.started(mine), desk.started(other)
    _, after = desk.disowned(mine)
    assert [order.token for order in orders(after, Cancel)] == [token]
    assert not [message for message in after.control if isinstance(message, Kill)]
    desk.say("r1", Finished(token=kept, ending="returned", result=b"1"))
    batch, _ = desk.book.take()
    assert batch.ends == [other.no]


def test_a_copy_that_has_ended_is_renamed_only(desk: Desk) -> None:
    desk.runner("r1")
    run = desk.book.accept(submission(), 1.0)
    id, token = run.id, desk.started(run)
    desk.say("r1", Finished(token=token, ending="returned", result=b"1"))
    desk.book.take()
    batch, after = desk.disowned(run)
    assert batch.renamed == {run.no: f"{id}~{run.no}"}
    assert (batch.changed, batch.events, after.ended) == ({}, [], [])
    assert run.no not in desk.book.untold
    assert not orders(after, Start)
