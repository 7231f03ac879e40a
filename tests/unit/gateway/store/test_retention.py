"""What retention takes out, and what it never does, slice by slice."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.store import retention
from gateway.store.removal import (
    OldestEvents,
    OldEvents,
    OldGrants,
    OldKeys,
    OldResults,
    OldRuns,
    Removal,
    Removed,
    SurplusEvents,
)
from gateway.store.retention import ROW_BYTES, SLICE_ROWS
from gateway.store.rows import EventRow, OutputRow, RevocationRow, RunRow, TicketRow
from gateway.store.writer import Writer
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.store import samples
from tests.unit.gateway.store.samples import BLOB, write

#: Bytes that one event or line of these tests counts for.
ONE = 10 + ROW_BYTES


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    (tmp_path / "blobs").mkdir()
    with closing(Writer(tmp_path / "store.sqlite3", boot_id="boot", durability="process")) as writer:
        yield writer


def ended(no: int, at: float, **changes: Any) -> RunRow:
    return samples.run(no, status=RunStatus.SUCCESSFUL, finished_at=at, version=2, told=2, **changes)


def speak(writer: Writer, run: RunRow, *times: float, blob: str | None = None) -> None:
    """Have a run say an event of ten bytes at each of these times, in commits of 500."""
    first = writer.connection.execute("SELECT coalesce(max(pos), 0) FROM event").fetchone()[0] + 1
    events = []
    for number, at in enumerate(times):
        run.tail += 1
        data = b"" if blob else b"0123456789"
        events.append(EventRow(first + number, run.no, run.tail, 1, "tick", data, at, blob))
    for start in range(0, len(events), 500):
        write(writer, events=events[start : start + 500])
    write(writer, changed={run.no: run})


def speak_lines(writer: Writer, run: RunRow, *times: float) -> None:
    lines = []
    for at in times:
        run.lines += 1
        lines.append(OutputRow(run.no, run.lines, run.tail, 1, "stdout", "0123456789", at))
    write(writer, outputs=lines, changed={run.no: run})


def take(writer: Writer, removal: Removal, slices: int = 1000) -> Removed:
    """Take slices until there is no more."""
    removed = Removed(more=True)
    while removed.more:
        assert (slices := slices - 1), "it does not come to an end"
        one, _ = writer.remove(removal)
        assert max(one.events, one.lines) <= SLICE_ROWS + 1
        removed.add(one)
        if isinstance(removal, OldestEvents):
            removal = OldestEvents(removal.size - one.size)
    return removed


def offsets(writer: Writer, run: int, table: str = "event") -> list[int]:
    found = writer.connection.execute(f'SELECT "offset" FROM {table} WHERE run = ? ORDER BY "offset"', (run,))
    return [offset for (offset,) in found]


def count(writer: Writer, table: str) -> int:
    return int(writer.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


class TestOldEvents:
    def test_the_oldest_go_the_newest_of_each_run_stays(self, writer: Writer) -> None:
        one, two = samples.run(1), ended(2, 5.0)
        write(writer, runs=[one, two])
        speak(writer, one, 1.0, 2.0, 3.0, 50.0)
        speak(writer, two, 4.0, 5.0)
        removed = take(writer, OldEvents(10.0))
        assert (offsets(writer, 1), offsets(writer, 2)) == ([4], [2])
        assert (removed.events, removed.size) == (4, 4 * ONE)

    def test_lines_go_with_them(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak_lines(writer, run, 1.0, 2.0, 30.0)
        assert take(writer, OldEvents(10.0)).lines == 2
        assert offsets(writer, 1, "output") == [3]

    def test_what_was_the_newest_once_goes_when_it_is_not_any_more(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak(writer, run, 1.0, 2.0)
        take(writer, OldEvents(10.0))
        assert offsets(writer, 1) == [2]
        speak(writer, run, 20.0, 21.0, 50.0)
        take(writer, OldEvents(30.0))
        assert offsets(writer, 1) == [5], "no hole behind an event that was passed over"

    def test_events_dated_into_the_future_do_not_hold_up_the_rest(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak(writer, run, 1.0, 9e9, 2.0, 50.0)
        take(writer, OldEvents(10.0))
        assert offsets(writer, 1) == [4]

    def test_many_go_in_slices(self, writer: Writer) -> None:
        runs = [samples.run(no) for no in (1, 2, 3)]
        write(writer, runs=runs)
        for run in runs:
            speak(writer, run, *[1.0] * 1500)
        one, _ = writer.remove(OldEvents(10.0))
        assert one.more
        assert 0 < one.events <= SLICE_ROWS
        take(writer, OldEvents(10.0))
        assert [offsets(writer, no) for no in (1, 2, 3)] == [[1500]] * 3

    def test_a_slice_that_fails_is_taken_again(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak(writer, run, 1.0, 2.0, 3.0)
        writer.connection.execute("PRAGMA query_only = 1")
        with pytest.raises(sqlite3.OperationalError):
            writer.remove(OldEvents(10.0))
        writer.connection.execute("PRAGMA query_only = 0")
        take(writer, OldEvents(10.0))
        assert offsets(writer, 1) == [3]


class TestOldestEvents:
    def test_as_much_goes_as_is_too_much(self, writer: Writer) -> None:
        one, two = samples.run(1), samples.run(2)
        write(writer, runs=[one, two])
        for at in range(1, 6):
            speak(writer, one, float(at))
            speak(writer, two, float(at))
        before = writer.grown
        assert before == 10 * ONE
        take(writer, OldestEvents(3 * ONE))
        assert (offsets(writer, 1), offsets(writer, 2)) == ([3, 4, 5], [2, 3, 4, 5])
        assert writer.grown == before - 3 * ONE

    def test_lines_and_events_go_by_their_age(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak_lines(writer, run, 1.0, 2.0)
        speak(writer, run, 3.0, 4.0, 5.0)
        take(writer, OldestEvents(2 * ONE))
        assert (offsets(writer, 1, "output"), offsets(writer, 1)) == ([], [1, 2, 3])

    def test_it_ends_when_nothing_is_left_but_the_newest(self, writer: Writer) -> None:
        run = samples.run(1)
        write(writer, runs=[run])
        speak(writer, run, *[1.0] * 2500)
        take(writer, OldestEvents(10**9))
        assert offsets(writer, 1) == [2500]
        assert writer.grown == ONE

    def test_a_large_value_counts_with_its_file(self, writer: Writer, tmp_path: Path) -> None:
        (tmp_path / "blobs" / BLOB).write_bytes(b"x" * 5000)
        run = samples.run(1)
        write(writer, runs=[run])
        speak(writer, run, 1.0, blob=BLOB)
        speak(writer, run, 2.0)
        assert writer.grown == 5000 + ROW_BYTES + ONE
        removed = take(writer, OldestEvents(1))
        assert (removed.blobs, removed.size) == ([BLOB], 5000 + ROW_BYTES)
        assert os.path.exists(tmp_path / "blobs" / BLOB), "not before the commit is safe"


def test_a_long_stream_keeps_its_newest(writer: Writer) -> None:
    run = samples.run(1)
    write(writer, runs=[run])
    speak(writer, run, *[1.0] * 2500)
    speak_lines(writer, run, *[1.0] * 30)
    removed = take(writer, SurplusEvents(1, 7))
    assert offsets(writer, 1) == list(range(2494, 2501))
    assert offsets(writer, 1, "output") == list(range(24, 31))
    assert (removed.events, removed.lines) == (2493, 23)
    assert take(writer, SurplusEvents(99, 7)).rows == 0


class TestOldRuns:
    def test_everything_of_a_run_goes(self, writer: Writer) -> None:
        run = ended(1, 5.0, result_blob=BLOB)
        attempts = [
            samples.attempt(1, 1, started_at=1.0, ending="lost"),
            samples.attempt(1, 2, ending="lost"),
        ]
        write(writer, runs=[run], attempts=attempts, ends=[1], keys=[samples.key("k")])
        speak(writer, run, *[1.0] * 2300)
        speak_lines(writer, run, 1.0, 2.0)
        removed = take(writer, OldRuns(10.0))
        assert (removed.runs, removed.events, removed.lines, removed.keys) == (1, 2300, 2, 1)
        assert removed.blobs == [BLOB]
        for table in ("run", "attempt", "event", "output", "ending", "idempotency"):
            assert count(writer, table) == 0, table
        assert writer.grown == 0

    @pytest.mark.parametrize(
        "kept",
        [
            samples.run(1, status=RunStatus.RUNNING),
            replace(ended(1, 5.0), told=1),
            ended(1, 50.0),
        ],
        ids=["open", "Django does not know", "young"],
    )
    def test_not_every_run_may_go(self, writer: Writer, kept: RunRow) -> None:
        write(writer, runs=[kept])
        speak(writer, kept, 1.0)
        assert take(writer, OldRuns(10.0)).rows == 0
        assert take(writer, OldResults(10.0)).rows == 0
        assert offsets(writer, 1) == [1]

    def test_those_that_must_stay_do_not_hold_up_others(self, writer: Writer) -> None:
        runs = [replace(ended(no, 5.0), told=1) for no in range(1, 101)]
        write(writer, runs=[*runs, *[ended(no, 5.0) for no in range(101, 301)]])
        assert take(writer, OldRuns(10.0)).runs == 200
        assert count(writer, "run") == 100

    def test_its_number_is_not_given_out_again(self, writer: Writer) -> None:
        write(writer, runs=[ended(1, 5.0)])
        take(writer, OldRuns(10.0))
        found = writer.connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'run'").fetchone()
        assert found == (1,)


def test_a_result_goes_the_run_stays(writer: Writer) -> None:
    runs = [
        ended(1, 5.0, result=b"[1]"),
        ended(2, 5.0, result_blob=BLOB),
        ended(3, 50.0, result=b"3"),
        ended(4, 5.0),
    ]
    write(writer, runs=runs)
    removed = take(writer, OldResults(10.0))
    assert (removed.results, removed.blobs) == (2, [BLOB])
    found = writer.connection.execute("SELECT no, result, result_blob, result_expired FROM run ORDER BY no")
    assert found.fetchall() == [
        (1, None, None, 1),
        (2, None, None, 1),
        (3, b"3", None, 0),
        (4, None, None, 0),
    ]


def test_old_keys_go(writer: Writer) -> None:
    write(writer, keys=[samples.key("a"), replace(samples.key("b"), created_at=50.0)])
    assert take(writer, OldKeys(10.0)).keys == 1
    assert writer.connection.execute("SELECT key FROM idempotency").fetchall() == [("b",)]


def test_used_tickets_and_revocations_go_when_they_have_expired(writer: Writer) -> None:
    write(
        writer,
        tickets=[TicketRow(f"t{n}", float(n)) for n in range(SLICE_ROWS + 20)],
        revocations=[RevocationRow("jti", "a", 0.0, 5.0), RevocationRow("sub", "a", 0.0, 500.0)],
    )
    assert take(writer, OldGrants(SLICE_ROWS + 10.0)).grants == SLICE_ROWS + 11
    rows = writer.connection.execute("SELECT kind FROM revocation").fetchall()
    assert rows == [("sub",)]
    assert writer.connection.execute("SELECT count(*) FROM ticket").fetchall() == [(10,)]


def test_whatever_is_removed_what_is_kept_has_no_hole(writer: Writer, rng: random.Random) -> None:
    runs = [samples.run(no) for no in range(1, 6)]
    write(writer, runs=runs)
    for step in range(1, 200):
        run = rng.choice(runs)
        at = float(step) if rng.random() < 0.9 else rng.choice([0.0, 1e9])  # a clock that is wrong at times
        speak(writer, run, *[at] * rng.randrange(1, 9))
        removal: Removal = rng.choice(
            [OldEvents(step - 20.0), OldestEvents(5 * ONE), SurplusEvents(run.no, rng.randrange(1, 20))]
        )
        if rng.random() < 0.3:
            take(writer, removal)
        for one in runs:
            kept = offsets(writer, one.no)
            assert kept == list(range(one.tail - len(kept) + 1, one.tail + 1)), (step, removal)
            assert bool(kept) == bool(one.tail)
    assert writer.grown == count(writer, "event") * ONE


@pytest.mark.parametrize(
    ("sql", "index"),
    [
        (
            "SELECT no FROM run WHERE finished_at IS NOT NULL AND version <= told AND finished_at < 9 "
            "ORDER BY finished_at LIMIT 50",
            "run_done",
        ),
        (
            "SELECT no FROM run WHERE finished_at IS NOT NULL AND version <= told AND finished_at < 9 "
            "AND (result IS NOT NULL OR result_blob IS NOT NULL) ORDER BY finished_at LIMIT 50",
            "run_done_result",
        ),
        ("SELECT run FROM output WHERE at < 9 ORDER BY at LIMIT 9", "output_by_age"),
        ("DELETE FROM attempt WHERE run = 1", "attempt_by_run"),
        ("DELETE FROM idempotency WHERE run = 'x'", "key_by_run"),
        ("SELECT key FROM idempotency WHERE created_at < 9 ORDER BY created_at LIMIT 9", "key_by_age"),
        ("SELECT blob FROM event WHERE blob IS NOT NULL", "event_blob"),
    ],
)
def test_what_is_due_is_found_by_an_index(writer: Writer, sql: str, index: str) -> None:
    plan = " ".join(row[3] for row in writer.connection.execute(f"EXPLAIN QUERY PLAN {sql}"))
    assert f"INDEX {index}" in plan, plan
    assert "TEMP B-TREE" not in plan, plan


def test_only_what_nothing_refers_to_is_an_orphan(writer: Writer) -> None:
    other = "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f507"
    third = "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f508"
    run = ended(1, 5.0, result_blob=other)
    write(writer, runs=[run])
    speak(writer, run, 1.0, blob=BLOB)
    assert retention.unreferenced(writer.connection, [BLOB, other, third]) == [third]
