"""The store as the gateway uses it: from trio, beside readers, across crashes."""

from __future__ import annotations

import inspect
import logging
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway.store.protocol import Store, StoreError
from gateway.store.rows import Batch, EventRow, InputRow, Opened, RevocationRow, RunFilter, RunRow, TicketRow
from gateway.store.sqlite import SqliteStore
from gateway.store.writer import WalGauge
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.store import samples

#: Commits batches of three events for ever; says after each which event it has acknowledged.
_WRITES_FOR_EVER = """
import sys, trio
from pathlib import Path
from gateway.store.rows import Batch
from gateway.store.sqlite import SqliteStore
from tests.unit.gateway.store import samples

async def main():
    store = SqliteStore(Path(sys.argv[1]), boot_id="boot-1")
    found = await store.open()
    run = found.runs.get(1) or samples.run(1)
    await store.commit(Batch(runs=[] if found.runs else [run], sources={"r1": run.tail}))
    while True:
        events = [samples.event(run.tail + n, 1, run.tail + n) for n in (1, 2, 3)]
        run.tail += 3
        full = run.tail % 2 == 0
        await store.commit(Batch(changed={1: run}, events=events, sources={"r1": run.tail}, full=full))
        print(run.tail, flush=True)

trio.run(main)
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state", boot_id="boot-1")
    await store.open()
    yield store
    with trio.fail_after(20):
        await store.close()


async def _offsets(store: Store, run: int = 1) -> list[int]:
    return [event.offset for event in await store.events(run, 0, 1_000_000, 1_000_000_000)]


def _hold_writer(store: SqliteStore) -> threading.Event:
    """Keep the writing thread busy until the returned event is set."""
    release = threading.Event()
    store._writer_thread.submit(lambda: release.wait(10))
    return release


async def test_what_was_committed_is_read(store: SqliteStore) -> None:
    run, attempt, key = samples.run(1), samples.attempt(1), samples.key("k")
    events = [samples.event(n, 1, n) for n in (1, 2, 3)]
    lines = [samples.output(1, n) for n in (1, 2)]
    await store.commit(
        Batch(runs=[run], attempts=[attempt], events=events, outputs=lines, keys=[key], full=True)
    )
    assert await store.run("run-1") == run
    assert await store.runs(RunFilter()) == [run]
    assert await store.run_of_row("none") is None
    assert await store.attempts(1) == [attempt]
    assert await store.events(1, 1, 10, 1000) == events[1:]
    assert await store.outputs(1, 0, 1) == lines[:1]
    assert await store.last_outputs(1, 1, 1) == lines[1:]
    assert await store.key("ann", "k") == key
    assert (await store.counts())["READY"] == 1


async def test_tickets_and_revocations_are_there_when_it_opens_again(store: SqliteStore) -> None:
    ticket, old = TicketRow("t", 9.0), RevocationRow("sub", "ann", 1.0, 10.0)
    newer, other = RevocationRow("sub", "ann", 2.0, 11.0), RevocationRow("jti", "ann", 1.0, 12.0)
    await store.commit(Batch(tickets=[ticket], revocations=[old, other], full=True))
    await store.commit(Batch(revocations=[newer]))
    await store.close()
    found = await store.open()
    assert (found.tickets, found.revocations) == ([ticket], [newer, other])


async def test_what_runs_were_told_is_there_until_they_end(store: SqliteStore) -> None:
    told = [InputRow(run, number, "a", b"{}", "k", 1.0) for run, number in ((1, 1), (1, 2), (2, 1))]
    await store.commit(Batch(inputs=told[::-1], full=True))
    await store.commit(Batch(told_enough=[2]))
    await store.close()
    assert (await store.open()).inputs == told[:2]


async def test_it_opens_where_it_was_closed(store: SqliteStore) -> None:
    run = samples.run(1, tags=("a",), row_key="demo.example:1")
    await store.commit(Batch(runs=[run], attempts=[samples.attempt(1)], sources={"r1": 3}))
    await store.commit(Batch(events=[samples.event(9, 1, 1)]))
    await store.close()
    found = await store.open()
    assert found == Opened(
        runs={1: run},
        attempts=[samples.attempt(1)],
        sources={"r1": 3},
        next_no=2,
        next_pos=10,
        newest_id=run.id,
    )


async def test_the_data_of_a_blob_is_filled_in(store: SqliteStore) -> None:
    (store.blobs / samples.BLOB).write_bytes(b'{"large":true}')
    event = samples.event(1, 1, 1, b"", samples.BLOB)
    await store.commit(Batch(events=[event]))
    assert await store.events(1, 0, 10, 1000) == [event._replace(data=b'{"large":true}')]


async def test_an_empty_batch_writes_nothing(store: SqliteStore) -> None:
    release = _hold_writer(store)
    with trio.fail_after(5):
        await store.commit(Batch(full=True))
    release.set()


class TestLock:
    async def test_a_second_opener_is_told_who_has_it(self, store: SqliteStore) -> None:
        second = SqliteStore(store.directory, boot_id="boot-1")
        with pytest.raises(StoreError, match=r"process \d+ has the store open: .*store\.lock"):
            await second.open()
        await store.commit(Batch(sources={"r1": 1}))
        await store.close()
        assert (await second.open()).sources == {"r1": 1}
        await second.close()

    async def test_it_cannot_be_opened_twice(self, store: SqliteStore) -> None:
        with pytest.raises(StoreError, match="open already"):
            await store.open()
        await store.commit(Batch(sources={"r1": 1}))

    async def test_an_open_that_failed_leaves_nothing_locked(self, tmp_path: Path) -> None:
        (tmp_path / "store.sqlite3").write_bytes(b"no database at all, but long enough" * 100)
        store = SqliteStore(tmp_path, boot_id="boot-1")
        with pytest.raises(StoreError, match="not a database"):
            await store.open()
        (tmp_path / "store.sqlite3").unlink()
        assert (await store.open()).next_no == 1
        await store.close()

    async def test_a_directory_that_cannot_be_made_is_a_store_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StoreError, match="NotADirectoryError"):
            await SqliteStore(tmp_path / "file" / "state", boot_id="boot-1").open()


class TestErrors:
    async def test_a_full_disk_is_a_store_error_and_passes(self, store: SqliteStore) -> None:
        await store.commit(Batch(runs=[samples.run(1)]))
        parts = store._require()
        pages = parts.writer.connection.execute("PRAGMA page_count").fetchall()[0][0]
        parts.writer.connection.execute(f"PRAGMA max_page_count = {pages}")
        batch = Batch(events=[samples.event(n, 1, n, b"x" * 4000) for n in range(1, 30)], ends=[1], full=True)
        for _ in range(2):
            with pytest.raises(StoreError, match="SQLITE_FULL"):
                await store.commit(batch)
            assert await _offsets(store) == []
        parts.writer.connection.execute("PRAGMA max_page_count = 1000000")
        await store.commit(batch)
        assert await _offsets(store) == list(range(1, 30))

    async def test_a_read_only_disk_is_a_store_error_and_reads_go_on(self, store: SqliteStore) -> None:
        await store.commit(Batch(runs=[samples.run(1)]))
        connection = store._require().writer.connection
        connection.execute("PRAGMA query_only = 1")
        with pytest.raises(StoreError, match="SQLITE_READONLY"):
            await store.commit(Batch(sources={"r1": 1}))
        assert await store.run("run-1") is not None
        connection.execute("PRAGMA query_only = 0")
        await store.commit(Batch(sources={"r1": 1}))

    async def test_a_second_end_is_our_bug_and_writes_nothing(self, store: SqliteStore) -> None:
        await store.commit(Batch(runs=[samples.run(1)], events=[samples.event(1, 1, 1)], ends=[1]))
        with pytest.raises(sqlite3.IntegrityError):
            await store.commit(Batch(events=[samples.event(2, 1, 2)], ends=[1]))
        assert await _offsets(store) == [1]

    async def test_a_broken_read_does_not_break_the_next(self, store: SqliteStore) -> None:
        await store.commit(Batch(runs=[samples.run(1)]))

        def fail(connection: sqlite3.Connection) -> None:
            connection.execute("SELECT count(*) FROM run").fetchall()
            raise sqlite3.OperationalError("disk I/O error")

        with pytest.raises(StoreError, match="disk I/O error"):
            await store._read(fail)
        assert await store.run("run-1") is not None

    async def test_a_read_cannot_write(self, store: SqliteStore) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM run")

        with pytest.raises(StoreError, match="SQLITE_READONLY"):
            await store._read(write)


class TestCancellation:
    async def test_a_commit_that_has_not_begun_does_not_happen(self, store: SqliteStore) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.commit(Batch(events=[samples.event(1, 1, 1)]))
        assert scope.cancelled_caught
        assert await _offsets(store) == []

    async def test_a_commit_under_way_completes_and_says_so(self, store: SqliteStore) -> None:
        release = _hold_writer(store)
        returned = False

        async def commit() -> None:
            nonlocal returned
            with scope:
                await store.commit(Batch(events=[samples.event(1, 1, 1)]))
                returned = True

        scope = trio.CancelScope()
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commit)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert not returned
                release.set()
        assert returned
        assert await _offsets(store) == [1]

    async def test_a_row_changed_during_the_commit_is_stored_as_it_was_at_the_call(
        self, store: SqliteStore
    ) -> None:
        run = samples.run(1)
        await store.commit(Batch(runs=[run]))
        release = _hold_writer(store)
        batch = Batch(changed={1: run}, events=[samples.event(1, 1, 1)])
        run.tail = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit, batch)
            await trio.testing.wait_all_tasks_blocked()
            run.tail = 2
            batch.events.append(samples.event(2, 1, 2))
            release.set()
        stored = await store.run("run-1")
        assert stored is not None
        assert stored.tail == 1
        assert await _offsets(store) == [1]

    async def test_a_cancelled_read_returns_at_once_and_its_connection_is_not_lost(
        self, store: SqliteStore
    ) -> None:
        release = threading.Event()

        def slow(connection: sqlite3.Connection) -> None:
            release.wait(10)
            connection.execute("SELECT count(*) FROM run").fetchall()

        with trio.fail_after(5), trio.move_on_after(0.05) as scope:
            await store._read(slow)
        assert scope.cancelled_caught
        release.set()
        await store.commit(Batch(runs=[samples.run(1)]))
        assert await store.run("run-1") is not None

    async def test_close_works_when_cancelled(self, store: SqliteStore) -> None:
        release = _hold_writer(store)
        committed = False

        async def commit() -> None:
            nonlocal committed
            await store.commit(Batch(events=[samples.event(1, 1, 1)]))
            committed = True

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commit)
                await trio.testing.wait_all_tasks_blocked()
                with trio.CancelScope() as scope:
                    scope.cancel()
                    release.set()
                    await store.close()
        assert committed
        await store.open()
        assert await _offsets(store) == [1]


class TestClose:
    async def test_a_closed_store_says_so(self, store: SqliteStore) -> None:
        await store.close()
        await store.close()
        with pytest.raises(StoreError, match="not open"):
            await store.commit(Batch(sources={"r1": 1}))
        with pytest.raises(StoreError, match="not open"):
            await store.counts()

    async def test_it_leaves_no_thread_and_no_wal(self, store: SqliteStore) -> None:
        await store.commit(Batch(sources={"r1": 1}))
        assert {"store-writer", "store-checkpoint"} <= {thread.name for thread in threading.enumerate()}
        await store.close()
        for thread in threading.enumerate():
            if thread.name.startswith("store-"):
                await trio.to_thread.run_sync(thread.join, 5)
                assert not thread.is_alive()
        assert {file.name for file in store.directory.iterdir()} == {"store.sqlite3", "store.lock", "blobs"}

    async def test_a_read_under_way_does_not_hold_it_up(self, store: SqliteStore) -> None:
        entered, release = threading.Event(), threading.Event()

        def slow(connection: sqlite3.Connection) -> int:
            entered.set()
            release.wait(10)
            return int(connection.execute("SELECT count(*) FROM run").fetchall()[0][0])

        counted: list[int] = []

        async def read() -> None:
            counted.append(await store._read(slow))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.to_thread.run_sync(entered.wait, 5)
                await store.close()
                release.set()
        assert counted == [0]


class TestCheckpoint:
    async def test_it_copies_everything_when_nobody_reads(self, store: SqliteStore) -> None:
        await store.commit(Batch(events=[samples.event(1, 1, 1, b"x" * 100_000)]))
        assert await store.checkpoint()
        await store.commit(Batch(sources={"r1": 1}))
        assert store._require().writer.wal_size() < 100_000

    async def test_the_wal_stays_bounded_under_steady_commits(self, store: SqliteStore) -> None:
        writer = store._require().writer
        writer.gauge = WalGauge(passive=200_000, restart=800_000)
        sizes = []
        with trio.fail_after(60):
            for n in range(1, 201):
                await store.commit(Batch(events=[samples.event(n, 1, n, b"x" * 50_000)]))
                sizes.append(writer.wal_size())
        assert max(sizes) < 3_000_000, sizes  # 10 MB were written
        assert await _offsets(store) == list(range(1, 201))

    async def test_one_that_fails_is_logged_and_harms_no_commit(
        self, store: SqliteStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise StoreError("no space for the checkpoint")

        with caplog.at_level(logging.WARNING):
            store._checkpoint_thread.submit(fail)
            assert await store.checkpoint()  # behind it in the same queue
        assert "no space for the checkpoint" in caplog.text
        await store.commit(Batch(sources={"r1": 1}))


async def test_reads_beside_a_busy_writer_see_whole_batches(store: SqliteStore) -> None:
    await store.commit(Batch(runs=[samples.run(1)]))
    batches, size = 150, 7
    done = trio.Event()

    async def write() -> None:
        run = samples.run(1)
        for first in range(1, batches * size, size):
            run.tail = first + size - 1
            events = [samples.event(n, 1, n) for n in range(first, first + size)]
            await store.commit(Batch(changed={1: run}, events=events))
        done.set()

    async def read() -> None:
        newest = 0
        while not done.is_set():
            offsets = await _offsets(store)
            assert offsets == list(range(1, len(offsets) + 1))
            assert len(offsets) % size == 0
            assert len(offsets) >= newest
            newest = len(offsets)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(6):  # more than there are reading connections
                nursery.start_soon(read)
            nursery.start_soon(write)
    assert len(await _offsets(store)) == batches * size


async def test_a_kill_between_any_two_instructions_loses_nothing_acknowledged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    stored = 0
    for _ in range(4):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", _WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        said = b""
        try:
            with trio.fail_after(30):
                while said.count(b"\n") < rng.randint(1, 200):
                    said += await process.stdout.receive_some(65536)
        finally:
            process.send_signal(signal.SIGKILL)
            with trio.CancelScope(shield=True), trio.fail_after(10):
                said += b"".join([part async for part in process.stdout])
                await process.wait()
                await process.stdout.aclose()
        acknowledged = int(said.split(b"\n")[-2])
        store = SqliteStore(tmp_path, boot_id="boot-1")
        found = await store.open()
        stored = found.runs[1].tail
        assert acknowledged <= stored <= acknowledged + 3
        assert await _offsets(store) == list(range(1, stored + 1))
        assert found.sources == {"r1": stored}
        assert found.next_pos == stored + 1
        await store.close()
    assert stored > 0


async def test_a_living_process_is_named_as_the_holder(tmp_path: Path) -> None:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", _WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(30):
            await process.stdout.receive_some(100)
        with pytest.raises(StoreError, match=f"process {process.pid} has the store open"):
            await SqliteStore(tmp_path, boot_id="boot-1").open()
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.fail_after(10):
            await process.wait()
            await process.stdout.aclose()


class _Model:
    """What the store should hold, kept in dictionaries."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.runs: dict[int, RunRow] = {}
        self.events: dict[int, list[EventRow]] = {}
        self.sources: dict[str, int] = {}
        self.runner = "r"
        self.pos = 0

    def step(self) -> Batch:
        """Change the model at random; return the same as a batch."""
        batch = Batch(full=self.rng.random() < 0.3)
        actions = [self.accept, self.speak, self.end, self.tell, self.drain]
        for action in self.rng.choices(actions, weights=[4, 8, 4, 4, 1], k=4):
            action(batch)
        return batch

    def _open(self) -> list[RunRow]:
        return [run for run in self.runs.values() if not run.status.is_terminal]

    def accept(self, batch: Batch) -> None:
        run = samples.run(len(self.runs) + 1, tags=tuple(self.rng.sample("abc", 2)), told=0)
        self.runs[run.no], self.events[run.no] = run, []
        batch.runs.append(run)
        batch.full = True

    def speak(self, batch: Batch) -> None:
        for run in self._open()[:3]:
            run.tail += 1
            self.pos += 1
            event = samples.event(self.pos, run.no, run.tail, self.rng.randbytes(self.rng.randint(0, 300)))
            self.events[run.no].append(event)
            batch.events.append(event)
            batch.changed[run.no] = run
            self.sources[self.runner] = batch.sources[self.runner] = self.pos

    def end(self, batch: Batch) -> None:
        for run in self.rng.sample(self._open(), min(1, len(self._open()))):
            run.status = self.rng.choice([RunStatus.SUCCESSFUL, RunStatus.FAILED, RunStatus.CANCELLED])
            run.version += 1
            run.result = self.rng.randbytes(3)
            batch.changed[run.no] = run
            batch.ends.append(run.no)

    def tell(self, batch: Batch) -> None:
        for run in self.rng.sample(list(self.runs.values()), min(2, len(self.runs))):
            run.told = batch.told[run.no] = run.version

    def drain(self, batch: Batch) -> None:
        batch.forgotten.append(self.runner)
        self.sources.pop(self.runner, None)
        self.runner += "+"  # the next one

    def opened(self) -> Opened:
        """Return what the store should find when it opens."""
        runs = {
            no: run for no, run in self.runs.items() if not run.status.is_terminal or run.version > run.told
        }
        newest = max((run.id for run in self.runs.values()), default="")
        return Opened(runs, [], self.sources, len(self.runs) + 1, self.pos + 1, newest_id=newest)


@pytest.mark.parametrize("seed", range(6))
async def test_it_agrees_with_a_model(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    model = _Model(random.Random(seed))
    store = SqliteStore(tmp_path, boot_id="boot-1", durability=model.rng.choice(["process", "power"]))
    await store.open()
    for _ in range(60):
        await store.commit(model.step())
        if model.rng.random() < 0.1:
            await store.close()
            assert await store.open() == model.opened()
    assert await store.runs(RunFilter(limit=10_000)) == list(reversed(model.runs.values()))
    for no, events in model.events.items():
        after = model.rng.randint(0, 20)
        assert await store.events(no, after, 10_000, 10**9) == events[after:]
    for tag in "abc":
        expected = [no for no, run in reversed(model.runs.items()) if tag in run.tags]
        assert [run.no for run in await store.runs(RunFilter(tag=tag, limit=10_000))] == expected
    await store.close()


def test_the_protocol_is_kept() -> None:
    asked = {name: method for name, method in vars(Store).items() if inspect.iscoroutinefunction(method)}
    assert "commit" in asked
    for name, method in asked.items():
        assert inspect.signature(getattr(SqliteStore, name)) == inspect.signature(method), name
