"""Upkeep of a real store: weighed, swept, made smaller, beside its work."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from gateway.store import schema
from gateway.store.protocol import Store
from gateway.store.removal import OldEvents
from gateway.store.retention import ROW_BYTES
from gateway.store.rows import Batch, EventRow
from gateway.store.sqlite import SqliteStore
from gateway.store.writer import Writer
from tests.unit.gateway.store import samples
from tests.unit.gateway.store.samples import BLOB, write

OTHER = "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f507"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state", boot_id="boot-1")
    await store.open()
    yield store
    with trio.fail_after(20):
        await store.close()


async def fill(store: Store, events: int, size: int = 1000, first: int = 1) -> None:
    run = samples.run(first, tail=events)
    rows = [EventRow(first + n, run.no, n + 1, 1, "tick", b"x" * size, 1.0) for n in range(events)]
    await store.commit(Batch(runs=[run], events=rows))


async def test_what_was_there_is_weighed_what_comes_is_added(store: SqliteStore) -> None:
    (store.blobs / BLOB).write_bytes(b"x" * 777)
    events = [samples.event(1, 1, 1, b"x" * 10), samples.event(2, 1, 2, b"", BLOB)]
    run = samples.run(1, tail=2, lines=1)
    await store.commit(Batch(runs=[run], events=events, outputs=[samples.output(1, 1)]))
    expected = 10 + 777 + len("line 1") + 3 * ROW_BYTES
    await store.close()
    await store.open()
    assert (await store.upkeep.usage()).events is None
    await store.upkeep.weigh()
    assert (await store.upkeep.usage()).events == expected
    await store.commit(Batch(events=[samples.event(3, 1, 3, b"x" * 100)]))
    usage = await store.upkeep.usage()
    assert usage.events == expected + 100 + ROW_BYTES
    assert (usage.blobs, usage.blob_bytes) == (1, 777)
    assert usage.file > 0
    assert usage.incremental


async def test_pages_are_given_back(store: SqliteStore) -> None:
    await fill(store, 4000)
    run = samples.run(1, tail=4001)
    await store.commit(Batch(changed={1: run}, events=[EventRow(9001, 1, 4001, 1, "tick", b"1", 1.0)]))
    while (await store.upkeep.remove(OldEvents(2.0))).more:
        pass
    before = await store.upkeep.usage()
    assert before.free > 3_000_000
    while await store.upkeep.vacuum(100):
        pass
    assert await store.upkeep.checkpoint()
    after = await store.upkeep.usage()
    assert after.free == 0
    assert after.file < before.file - 3_000_000
    assert os.stat(store.directory / "store.sqlite3").st_size == after.file
    assert [event.offset for event in await store.events(1, 0, 10, 1000)] == [4001]


async def test_a_note_is_found_again(store: SqliteStore) -> None:
    assert await store.upkeep.noted("x") is None
    await store.upkeep.note("x", "1")
    await store.close()
    await store.open()
    assert await store.upkeep.noted("x") == "1"


class TestSweep:
    async def test_orphans_go_when_they_are_old(self, store: SqliteStore) -> None:
        for name in (BLOB, OTHER):
            (store.blobs / name).write_bytes(b"12345")
        await store.commit(Batch(runs=[samples.run(1)], events=[samples.event(1, 1, 1, b"", BLOB)]))
        (store.blobs / "README").write_bytes(b"not ours")
        os.mkfifo(store.blobs / "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f509")
        for entry in os.scandir(store.blobs):
            os.utime(entry.path, (100.0, 100.0))
        assert await store.upkeep.sweep(99.0) == (0, 0)
        assert await store.upkeep.sweep(200.0) == (1, 5)
        assert {entry.name for entry in os.scandir(store.blobs)} == {
            BLOB,
            "README",
            "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f509",
        }

    async def test_what_an_open_attempt_may_have_written_stays(self, store: SqliteStore) -> None:
        """A store that was full for hours has blocked the runner between the file and the frame that names it."""
        (store.blobs / OTHER).write_bytes(b"12345")
        os.utime(store.blobs / OTHER, (100.0, 100.0))
        attempt = samples.attempt(1, assigned_at=50.0)
        await store.commit(Batch(runs=[samples.run(1)], attempts=[attempt]))
        assert await store.upkeep.sweep(200.0) == (0, 0)
        attempt.ending, attempt.ended_at = "lost", 150.0
        await store.commit(Batch(changed_attempts=[attempt]))
        assert await store.upkeep.sweep(200.0) == (1, 5)

    async def test_what_nothing_refers_to_is_dropped_whatever_its_age(self, store: SqliteStore) -> None:
        for name in (BLOB, OTHER):
            (store.blobs / name).write_bytes(b"12345")
        (store.blobs / "README").write_bytes(b"not ours")
        await store.commit(Batch(runs=[samples.run(1)], events=[samples.event(1, 1, 1, b"", BLOB)]))
        names = await store.upkeep.large_values()
        assert sorted(names) == sorted([BLOB, OTHER])
        assert await store.upkeep.drop(names) == (1, 5)
        assert await store.upkeep.large_values() == [BLOB]

    async def test_nothing_outside_the_directory_is_removed(self, store: SqliteStore) -> None:
        (store.directory / "precious").write_bytes(b"1")
        assert await store.upkeep.unlink(["../precious", "nothing", OTHER]) == 0
        assert (store.directory / "precious").exists()


class TestOldFiles:
    def make(self, path: Path, pages: int) -> None:
        """Make a file as the first version did: without auto_vacuum, with one step taken."""
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            schema.migrate(connection, schema.STEPS[:1])
            connection.execute("CREATE TABLE ballast (data BLOB)")
            connection.executemany("INSERT INTO ballast VALUES (?)", [(b"x" * 4000,)] * pages)

    def test_a_small_one_is_converted(self, tmp_path: Path) -> None:
        path = tmp_path / "store.sqlite3"
        self.make(path, 50)
        with closing(Writer(path, boot_id="b", durability="process")) as writer:
            assert writer.incremental
            write(writer, runs=[samples.run(1)])
            assert schema.get_meta(writer.connection, "schema") == str(len(schema.STEPS))
            assert writer.connection.execute("SELECT count(*) FROM ballast").fetchone() == (50,)

    def test_a_large_one_is_left_and_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gateway.store.writer.CONVERT_BYTES", 100_000)
        path = tmp_path / "store.sqlite3"
        self.make(path, 50)
        with closing(Writer(path, boot_id="b", durability="process")) as writer:
            assert not writer.incremental
            assert "cannot be given back" in caplog.text
            write(writer, runs=[samples.run(1)])
            assert writer.vacuum(10)[0] == 0


async def test_runs_that_django_does_not_know_come_in_pages(store: SqliteStore) -> None:
    runs = [samples.run(no, version=2, told=2 if no % 2 else 1) for no in range(1, 11)]
    await store.commit(Batch(runs=runs))
    page = await store.untold(0, 3)
    assert [run.no for run in page] == [2, 4, 6]
    assert [run.no for run in await store.untold(page[-1].no, 3)] == [8, 10]


async def test_a_directory_of_large_values_that_somebody_removed_is_an_empty_one(store: SqliteStore) -> None:
    for file in store.blobs.iterdir():
        file.unlink()
    store.blobs.rmdir()
    usage = await store.upkeep.usage()
    assert (usage.blobs, usage.blob_bytes) == (0, 0)
    assert await store.upkeep.sweep(1e12) == (0, 0)
