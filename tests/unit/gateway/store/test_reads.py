"""What is asked is answered from what was written, within its bounds."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from gateway.store import reads
from gateway.store.rows import QuarantinedRow, RunFilter
from gateway.store.writer import Writer
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.store import samples
from tests.unit.gateway.store.samples import BLOB, write


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with closing(Writer(tmp_path / "store.sqlite3", boot_id="boot-1", durability="process")) as writer:
        yield writer


@pytest.fixture
def db(writer: Writer) -> sqlite3.Connection:
    return writer.connection


def test_every_column_of_a_run_comes_back(writer: Writer, db: sqlite3.Connection) -> None:
    full = samples.run(
        7,
        args=b"[1]",
        kwargs=b'{"a":2}',
        row=b'{"pk":1}',
        row_key="demo.example:1",
        pool="heavy",
        priority=-5,
        run_after=1.25,
        timeout=30.0,
        max_attempts=3,
        on_lost="fail",
        metadata=b'{"m":null}',
        tags=("a", "b\N{SNOWMAN}", 'quote"', "\ud800"),
        subject="ann",
        origin="outbox",
        using="other",
        status=RunStatus.FAILED,
        attempt=3,
        counted=2,
        version=9,
        told=8,
        tail=100,
        lines=5,
        started_at=2.5,
        finished_at=3.5,
        result=b"null",
        result_blob=BLOB,
        error=b'{"code":"x"}',
        progress=b'{"done":1}',
        cancelling=True,
        replay_of="run-1",
        crashes=2,
        suspect=True,
    )
    write(writer, runs=[full, samples.run(8)])
    assert reads.run(db, full.id) == full
    assert reads.run(db, "run-8") == samples.run(8)
    assert reads.run(db, "nobody") is None


def test_opened_finds_open_runs_and_those_django_does_not_know(
    writer: Writer, db: sqlite3.Connection
) -> None:
    done, failed = RunStatus.SUCCESSFUL, RunStatus.FAILED
    runs = [
        samples.run(1),
        samples.run(2, status=RunStatus.RUNNING),
        samples.run(3, status=done, version=3, told=2),
        samples.run(4, status=failed, version=3, told=3),
    ]
    attempts = [samples.attempt(2), samples.attempt(4, ending="raised")]
    write(writer, runs=runs, attempts=attempts, sources={"r1": 12}, events=[samples.event(5, 2, 1)])
    found = reads.opened(db)
    assert found.runs == {run.no: run for run in runs[:3]}
    assert found.attempts == attempts[:1]
    assert found.sources == {"r1": 12}
    assert (found.next_no, found.next_pos) == (5, 6)
    assert found.newest_id == "run-4"


def test_an_empty_store_begins_at_one(db: sqlite3.Connection) -> None:
    found = reads.opened(db)
    assert (found.runs, found.attempts, found.sources) == ({}, [], {})
    assert (found.next_no, found.next_pos, found.newest_id) == (1, 1, "")


def test_attempts_come_oldest_first_with_what_changed(writer: Writer, db: sqlite3.Connection) -> None:
    first, second = samples.attempt(1), samples.attempt(1, 2)
    write(writer, attempts=[second, first, samples.attempt(2)])
    ended: dict[str, Any] = {"started_at": 2.0, "ended_at": 3.0, "ending": "crashed"}
    first = replace(first, **ended, cause=b'{"kind":"signal"}', failure=b"{}")
    write(writer, changed_attempts=[first])
    assert reads.attempts(db, 1) == [first, second]
    assert reads.attempts(db, 3) == []


def test_the_newest_run_of_a_row_is_found(writer: Writer, db: sqlite3.Connection) -> None:
    ended = samples.run(1, row_key="demo.example:1", status=RunStatus.SUCCESSFUL)
    write(
        writer,
        runs=[ended, samples.run(2, row_key="demo.example:1"), samples.run(3, row_key="demo.example:2")],
    )
    found = reads.run_of_row(db, "demo.example:1")
    assert found is not None
    assert found.no == 2
    assert reads.run_of_row(db, "demo.example:3") is None


def test_keys_belong_to_their_subject(writer: Writer, db: sqlite3.Connection) -> None:
    write(writer, keys=[samples.key("k", "ann"), samples.key("k", "bob")])
    assert reads.key(db, "bob", "k") == samples.key("k", "bob")
    assert reads.key(db, "eve", "k") is None


def test_counts_name_every_status(writer: Writer, db: sqlite3.Connection) -> None:
    write(writer, runs=[samples.run(1), samples.run(2), samples.run(3, status=RunStatus.CANCELLED)])
    assert reads.counts(db) == {"READY": 2, "RUNNING": 0, "SUCCESSFUL": 0, "FAILED": 0, "CANCELLED": 1}


class TestEvents:
    def _read(self, db: sqlite3.Connection, blobs: Path, **bounds: int) -> list[int]:
        asked = {"run": 1, "after": 0, "limit": 100, "max_bytes": 10_000} | bounds
        return [event.offset for event in reads.events(db, blobs, **asked)]

    def test_they_come_in_order_after_the_cursor(
        self, writer: Writer, db: sqlite3.Connection, tmp_path: Path
    ) -> None:
        write(writer, events=[samples.event(n, 1 + n % 2, (n + 1) // 2) for n in range(1, 21)])
        assert reads.events(db, tmp_path, 2, 8, 100, 10_000) == [
            samples.event(17, 2, 9),
            samples.event(19, 2, 10),
        ]
        assert self._read(db, tmp_path) == list(range(1, 11))
        assert self._read(db, tmp_path, after=10) == []
        assert self._read(db, tmp_path, after=10**30) == []
        assert self._read(db, tmp_path, limit=3) == [1, 2, 3]
        assert self._read(db, tmp_path, limit=0) == []
        assert self._read(db, tmp_path, limit=-1) == []

    def test_bytes_are_bounded_but_the_first_always_comes(
        self, writer: Writer, db: sqlite3.Connection, tmp_path: Path
    ) -> None:
        write(writer, events=[samples.event(n, 1, n, b"x" * 100) for n in range(1, 6)])
        assert self._read(db, tmp_path, max_bytes=300) == [1, 2, 3]
        assert self._read(db, tmp_path, max_bytes=299) == [1, 2]
        assert self._read(db, tmp_path, max_bytes=1) == [1]
        assert self._read(db, tmp_path, max_bytes=0, after=3) == [4]

    def test_blobs_are_filled_in_and_counted(
        self, writer: Writer, db: sqlite3.Connection, tmp_path: Path
    ) -> None:
        (tmp_path / BLOB).write_bytes(b"y" * 500)
        events = [samples.event(1, 1, 1), samples.event(2, 1, 2, blob=BLOB), samples.event(3, 1, 3)]
        write(writer, events=events)
        found = reads.events(db, tmp_path, 1, 0, 100, 10_000)
        assert found == [events[0], events[1]._replace(data=b"y" * 500), events[2]]
        assert self._read(db, tmp_path, max_bytes=506) == [1]
        assert self._read(db, tmp_path, max_bytes=507) == [1, 2]
        assert self._read(db, tmp_path, max_bytes=1, after=1) == [2]

    def test_no_snapshot_stays_open_when_bytes_end_the_read(
        self, writer: Writer, db: sqlite3.Connection, tmp_path: Path
    ) -> None:
        write(writer, events=[samples.event(n, 1, n, b"x" * 100) for n in range(1, 6)])
        with closing(sqlite3.connect(tmp_path / "store.sqlite3", isolation_level=None)) as reader:
            reads.events(reader, tmp_path, 1, 0, 100, 150)
            assert writer.restart_wal()


class TestBlobs:
    def _missing(self, name: str) -> bytes:
        return b'{"_missing_blob": "%s"}' % name.encode()

    def test_a_missing_file_is_named_in_its_place(self, tmp_path: Path) -> None:
        assert reads.read_blob(tmp_path, BLOB) == self._missing(BLOB)

    @pytest.mark.parametrize(
        "name", ["../secret", "secret", "/etc/hostname", "", ".", BLOB.upper(), f"{BLOB}\n"]
    )
    def test_only_a_uuid_names_a_blob(self, tmp_path: Path, name: str) -> None:
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for place in (tmp_path / "secret", blobs / "secret", blobs / BLOB.upper()):
            place.write_bytes(b"secret")
        assert reads.read_blob(blobs, name).startswith(b'{"_missing_blob": ')

    def test_only_a_plain_file_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / BLOB).symlink_to(tmp_path / "secret")
        assert reads.read_blob(tmp_path, BLOB) == self._missing(BLOB)
        (tmp_path / BLOB).unlink()
        os.mkfifo(tmp_path / BLOB)
        assert reads.read_blob(tmp_path, BLOB) == self._missing(BLOB)
        (tmp_path / BLOB).unlink()
        (tmp_path / BLOB).mkdir()
        assert reads.read_blob(tmp_path, BLOB) == self._missing(BLOB)

    def test_a_file_beyond_all_limits_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / BLOB).open("wb") as file:
            file.truncate(reads.MAX_BLOB + 1)
        assert reads.read_blob(tmp_path, BLOB) == self._missing(BLOB)


def test_output_is_read_forward_and_from_its_end(writer: Writer, db: sqlite3.Connection) -> None:
    lines = [samples.output(1, n, attempt=1 if n < 6 else 2) for n in range(1, 11)]
    logged = replace(samples.output(2, 1), stream="logging", level="INFO", logger="demo", after=7)
    write(writer, outputs=[*lines, logged])
    assert reads.outputs(db, 1, 7, 2) == lines[7:9]
    assert reads.outputs(db, 2, 0, 10) == [logged]
    assert reads.last_outputs(db, 1, 1, 3) == lines[2:5]
    assert reads.last_outputs(db, 1, 2, 50) == lines[5:]
    assert reads.last_outputs(db, 1, 3, 50) == []


class TestFilter:
    @pytest.fixture(autouse=True)
    def _runs(self, writer: Writer) -> None:
        ready, failed = RunStatus.READY, RunStatus.FAILED
        rows = [
            samples.run(1, task="demo.count", tags=("a",), subject="ann"),
            samples.run(2, task="demo.burn", tags=("a", "b"), subject="bob", status=failed),
            samples.run(3, task="shop.count", tags=('q"', "%", "a*"), subject="ann", status=failed),
            samples.run(4, task="demo.count", subject="bob", status=ready),
        ]
        write(writer, runs=rows)

    @pytest.mark.parametrize(
        ("which", "expected"),
        [
            ({}, [4, 3, 2, 1]),
            ({"limit": 2}, [4, 3]),
            ({"limit": 2, "before": 3}, [2, 1]),
            ({"limit": -1}, []),
            ({"before": 10**30}, [4, 3, 2, 1]),
            ({"status": RunStatus.FAILED}, [3, 2]),
            ({"task": "demo.count"}, [4, 1]),
            ({"task": "demo.*"}, []),
            ({"tag": "a"}, [2, 1]),
            ({"tag": 'q"'}, [3]),
            ({"tag": "%"}, [3]),
            ({"tag": "a*"}, [3]),
            ({"since": 2.0}, [4, 3, 2]),
            ({"until": 2.0}, [1]),
            ({"since": 2.0, "until": 4.0}, [3, 2]),
            ({"subject": "ann"}, [3, 1]),
            ({"owner": "ann", "tasks": ()}, [3, 1]),
            ({"owner": "ann", "ids": (), "tasks": ("demo.burn",), "until": 3.0}, [2, 1]),
            ({"ids": ("run-1", "run-3", "other")}, [3, 1]),
            ({"ids": ()}, []),
            ({"tasks": ()}, []),
            ({"tasks": ("demo.count",)}, [4, 1]),
            ({"tasks": ("demo.*",)}, [4, 2, 1]),
            ({"tasks": ("*",)}, [4, 3, 2, 1]),
            ({"tasks": ("*.count", "nothing")}, [4, 3, 1]),
            ({"tasks": ("demo?count", "demo.[cb]*")}, []),
            ({"tasks": ("DEMO.*",)}, []),
            ({"ids": ("run-3",), "tasks": ("demo.burn",)}, [3, 2]),
            ({"ids": ("run-3",), "tasks": ("demo.*",), "status": RunStatus.FAILED}, [3, 2]),
            ({"ids": (), "tasks": ()}, []),
            ({"status": RunStatus.FAILED, "tag": "a", "subject": "bob", "task": "demo.burn"}, [2]),
        ],
    )
    def test_it_selects(self, db: sqlite3.Connection, which: dict[str, Any], expected: list[int]) -> None:
        assert [run.no for run in reads.runs(db, RunFilter(**which))] == expected

    def test_ten_thousand_ids_are_one_statement(self, db: sqlite3.Connection) -> None:
        ids = tuple(f"run-{n}" for n in range(2, 40_000))
        assert [run.no for run in reads.runs(db, RunFilter(ids=ids))] == [4, 3, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_star_means_what_a_token_means_by_it(writer: Writer, db: sqlite3.Connection, seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)

    def text(letters: str) -> str:
        return "".join(rng.choices(letters, k=rng.randint(1, 6)))

    names = {text("ab.") for _ in range(60)}
    write(writer, runs=[samples.run(no, task=name) for no, name in enumerate(sorted(names), 1)])
    for _ in range(60):
        pattern = text("ab.*")
        found = {run.task for run in reads.runs(db, RunFilter(tasks=(pattern,), limit=100))}
        assert found == {name for name in names if fnmatchcase(name, pattern)}


def test_opened_finds_breakers_and_what_nobody_has_released(writer: Writer, db: sqlite3.Connection) -> None:
    failed: dict[str, Any] = {"status": RunStatus.FAILED, "finished_at": 9.0, "crashes": 3, "suspect": True}
    write(
        writer,
        runs=[
            samples.run(1, **failed),
            samples.run(2, **failed),
            samples.run(3, **failed | {"crashes": 2}),
            samples.run(4, replay_of="run-1"),
        ],
        breakers={"t.f": b"{}", "t.g": None},
    )
    found = reads.opened(db)
    assert found.breakers == {"t.f": b"{}"}
    assert found.quarantined == [QuarantinedRow("run-2", "demo.count", 9.0)]
    again = reads.run(db, "run-2")
    assert again is not None
    assert (again.crashes, again.suspect, again.replay_of) == (3, True, None)
    write(writer, breakers={"t.f": b"{1}", "t.h": b"{}"})
    assert reads.opened(db).breakers == {"t.f": b"{1}", "t.h": b"{}"}
    write(writer, breakers={"t.f": None})
    assert reads.opened(db).breakers == {"t.h": b"{}"}
