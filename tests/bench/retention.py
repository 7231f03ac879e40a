"""How long a commit takes while retention removes a million old events beside it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import trio

from gateway.retention import Retention
from gateway.store.rows import Batch, EventRow, RunRow
from gateway.store.sqlite import SqliteStore
from taskkit.settings import RetentionSettings, Settings
from tests.bench.figures import Figure, figure
from tests.bench.registry import benchmark

#: Old events per repetition, by so many runs, each with so many bytes of data.
OLD = 100_000
RUNS = 50
SIZE = 150

#: The load: commits with so many events, one after the other with so many seconds in between.
ROUND = 20
PAUSE = 0.004

#: Commits measured without retention, per repetition.
QUIET = 200


class Load:
    """A store with old events that gets new ones."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._pos = 0
        self._runs = [RunRow(no=no, id=f"run-{no}", task="bench.speak") for no in range(1, RUNS + 1)]

    async def fill(self, events: int) -> None:
        """Write events from long ago."""
        await self._store.commit(Batch(runs=self._runs))
        for _ in range(events // 1000):
            await self._store.commit(self._batch(1000, 1.0))
        await self._store.checkpoint()

    def _batch(self, events: int, at: float) -> Batch:
        batch = Batch()
        for _ in range(events):
            self._pos += 1
            run = self._runs[self._pos // 7 % RUNS]
            run.tail += 1
            batch.changed[run.no] = run
            batch.events.append(EventRow(self._pos, run.no, run.tail, 1, "progress", b"x" * SIZE, at))
        return batch

    async def commit(self) -> float:
        """Commit one round of new events; return the seconds it took."""
        batch = self._batch(ROUND, time.time())
        started = time.perf_counter()
        await self._store.commit(batch)
        took = time.perf_counter() - started
        await trio.sleep(PAUSE)
        return took


async def measure(old: int, quiet: int) -> list[Figure]:
    """Measure with so many old events, and so many commits without retention."""
    beside: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as folder:
        store = SqliteStore(Path(folder), boot_id="bench")
        await store.open()
        load = Load(store)
        await load.fill(old)
        without = [await load.commit() for _ in range(quiet)]
        settings = Settings(retention=RetentionSettings(event_age_seconds=86_400.0, every_seconds=86_400.0))
        retention = Retention(store, settings, "bench")

        async def commit_on(done: trio.Event) -> None:
            while not done.is_set():
                beside.append(await load.commit())

        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit_on, done)
            found = await retention.look()
            done.set()
        await store.close()
    rate = (found.removed.events + found.removed.lines) / found.seconds
    return [
        figure(f"commit of {ROUND} events", "ms", [seconds * 1e3 for seconds in without]),
        figure(f"the same while {old:,} old events are removed", "ms", [seconds * 1e3 for seconds in beside]),
        figure("old events removed", "1/s", [rate]),
        figure("free pages given back", "MiB", [max(found.freed_bytes, 1) / 2**20]),
    ]


@benchmark("retention", repetitions=10)
def run(repetitions: int) -> list[Figure]:
    """commit latency with and without retention removing 100,000 old events per repetition"""
    return trio.run(measure, OLD * repetitions, QUIET * repetitions)
