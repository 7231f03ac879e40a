"""Which waiting runs expire, and when."""

from __future__ import annotations

from typing import Any

from gateway.expiry import Expiry
from gateway.store.rows import RunRow
from taskkit.identifiers import new_run_id, run_id_time


def run(no: int, **changes: Any) -> RunRow:
    values = {"id": new_run_id(), "task": "t.f", "created_at": 1e12, "schedule_timeout": 10.0}
    return RunRow(no=no, **{**values, **changes})


def test_it_counts_from_the_submission_however_late_that_was_accepted() -> None:
    expiry, one = Expiry(), run(1)
    submitted = run_id_time(one.id)
    expiry.add(one)
    assert expiry.next() == submitted + 10.0
    assert expiry.due(submitted + 9.9) == []
    assert expiry.due(submitted + 10.0) == [1]
    assert expiry.next() is None


def test_a_wish_for_a_later_time_is_no_waiting() -> None:
    expiry = Expiry()
    expiry.add(run(1, run_after=2e12))
    assert expiry.next() == 2e12 + 10.0


def test_what_was_started_has_no_limit_and_none_was_wanted_for_others() -> None:
    expiry = Expiry()
    expiry.add(run(1, started_at=5.0))
    expiry.add(run(2, schedule_timeout=None))
    assert expiry.next() is None


def test_one_that_waits_no_longer_does_not_expire_but_may_wait_again() -> None:
    expiry, one = Expiry(), run(1)
    expiry.add(one)
    expiry.remove(1)
    assert expiry.due(1e13) == []
    expiry.add(one)
    expiry.add(one)
    assert expiry.due(1e13) == [1]


def test_those_that_left_are_forgotten() -> None:
    expiry = Expiry()
    for no in range(5_000):
        expiry.add(run(no))
        expiry.remove(no)
    assert len(expiry._heap) <= 1_001
