"""The loop that looks after a store: what it asks for, in which order, and when it does not."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from gateway.retention import Retention
from gateway.store.removal import (
    OldestEvents,
    OldEvents,
    OldGrants,
    OldKeys,
    OldResults,
    OldRuns,
    Removed,
    RunLength,
    SurplusEvents,
    Usage,
)
from gateway.store.rows import RunRow
from gateway.submission import Submission
from taskkit.errors import IdempotencyConflict, NotWritable
from taskkit.settings import RetentionSettings, Settings
from tests.unit.gateway.fakes import MemoryStore
from tests.unit.gateway.gate import Gate, gate, submission

KEEP = {
    "run_events": 10,
    "event_age_seconds": 100.0,
    "event_bytes": 1000,
    "run_age_seconds": 200.0,
    "key_age_seconds": 50.0,
    "every_seconds": 30.0,
}
NOTHING = dict.fromkeys(KEEP) | {"every_seconds": 30.0}


class Clock:
    """Both clocks; they agree until a test says otherwise."""

    def __init__(self) -> None:
        self.wall_at = 1e9
        self.counted_at = 0.0

    def wall(self) -> float:
        return self.wall_at

    def counted(self) -> float:
        return self.counted_at

    def pass_by(self, seconds: float) -> None:
        self.wall_at += seconds
        self.counted_at += seconds


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def retention(store: MemoryStore, clock: Clock, result_ttl: float | None = 25.0, **keep: Any) -> Retention:
    settings = Settings(retention=RetentionSettings(**(KEEP | keep)), result_ttl=result_ttl)
    return Retention(store, settings, "boot", clock.wall, clock.counted)


async def test_what_is_due_is_asked_for(store: MemoryStore, clock: Clock) -> None:
    store.upkeep.lengths_of = [
        RunLength(1, True, 11, 0),
        RunLength(2, False, 10, 10),
        RunLength(3, False, 1, 11),
    ]
    store.upkeep.used = Usage(file=1, wal=0, free=0, events=1300, blobs=0, blob_bytes=0, incremental=True)
    await retention(store, clock).look()
    assert store.upkeep.asked == [
        OldResults(1e9 - 25),
        OldRuns(1e9 - 200),
        OldKeys(1e9 - 50),
        OldGrants(1e9 - 3600),
        OldEvents(1e9 - 100),
        SurplusEvents(1, 10),
        SurplusEvents(3, 10),
        OldestEvents(300),
    ]
    assert store.upkeep.done[0] == "weigh"


async def test_what_is_kept_for_ever_is_not_asked_for(store: MemoryStore, clock: Clock) -> None:
    store.upkeep.lengths_of = [RunLength(1, True, 10**9, 0)]
    await retention(store, clock, result_ttl=None, **NOTHING).look()
    assert store.upkeep.asked == [OldGrants(1e9 - 3600)]  # what has expired is of no use to anybody


async def test_slices_follow_until_there_is_no_more(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    store.upkeep.answers = [
        Removed(results=5, more=True),
        Removed(results=5, more=True),
        Removed(results=1),
        Removed(runs=1, events=7, size=70, more=True),
        Removed(runs=2),
    ]
    one = await retention(store, clock).look()
    assert [type(asked) for asked in store.upkeep.asked[:5]] == [OldResults] * 3 + [OldRuns] * 2
    assert (one.removed.results, one.removed.runs, one.removed.events, one.removed.size) == (11, 3, 7, 70)


async def test_only_streams_that_may_have_grown_are_measured(store: MemoryStore, clock: Clock) -> None:
    one = retention(store, clock)
    store.upkeep.lengths_of = [RunLength(1, True, 5, 0), RunLength(2, False, 50, 0)]
    await one.look()
    assert SurplusEvents(2, 10) in store.upkeep.asked
    store.upkeep.asked.clear()
    store.upkeep.lengths_of = [
        RunLength(1, False, 50, 0),
        RunLength(2, False, 50, 0),
        RunLength(3, False, 11, 0),
    ]
    await one.look()
    surplus = [asked for asked in store.upkeep.asked if isinstance(asked, SurplusEvents)]
    assert surplus == [SurplusEvents(1, 10), SurplusEvents(3, 10)]
    store.upkeep.asked.clear()
    await one.look()
    assert not [asked for asked in store.upkeep.asked if isinstance(asked, SurplusEvents)]


async def test_a_clock_that_jumps_ahead_removes_nothing_for_its_age(
    store: MemoryStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one = retention(store, clock, event_bytes=50)
    await one.look()
    store.upkeep.asked.clear()
    clock.wall_at += 1e8
    clock.counted_at += 30
    with caplog.at_level(logging.WARNING):
        await one.look()
    assert "the wall clock has jumped ahead" in caplog.text
    assert store.upkeep.asked == [OldestEvents(50)], "what does not depend on the clock goes on"
    assert (await one.statistics())["retention"]["clock_held"] is True
    clock.pass_by(86_400)
    await one.look()
    assert OldRuns(clock.wall_at - 200) in store.upkeep.asked


async def test_files_go_after_what_referred_to_them_is_gone_for_good(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    one = retention(store, clock)
    store.upkeep.answers = [Removed(results=1, blobs=["a", "b"])]
    await one.look()
    assert store.upkeep.unlinked == [], "somebody may have read the name a moment ago"
    await trio.sleep(11)
    store.upkeep.done.clear()
    found = await one.look()
    assert store.upkeep.unlinked == ["a", "b"]
    assert store.upkeep.done.index("note") < store.upkeep.done.index("unlink")
    assert (found.blobs, found.blob_bytes) == (2, 20)
    await trio.sleep(11)
    await one.look()
    assert store.upkeep.unlinked == ["a", "b"], "once"


async def test_orphans_are_looked_for_now_and_then(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    one = retention(store, clock)
    for _ in range(3):
        await one.look()
    assert store.upkeep.swept == [1e9 - 3600]
    await trio.sleep(601)
    await one.look()
    assert len(store.upkeep.swept) == 2


async def test_what_lay_there_before_any_runner_lived_goes_at_once(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    store.blobs = {"a": b"1", "b": b"2"}
    one = retention(store, clock)
    await one.inherit()
    store.blobs["c"] = b"of a runner that lives"
    found = await one.look()
    assert store.upkeep.dropped == ["a", "b"]
    assert (found.blobs, found.blob_bytes) == (2, 20)
    await one.look()
    assert store.upkeep.dropped == ["a", "b"], "once"


async def test_a_store_that_does_not_answer_delays_it(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    one = retention(store, clock)
    store.broken = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await trio.sleep(100)
        assert store.upkeep.asked == []
        store.broken = False
        await trio.sleep(31)
        assert store.upkeep.asked
        nursery.cancel_scope.cancel()
    assert "retention waits for the store" in caplog.text


async def test_a_flood_does_not_keep_a_pass_from_its_end(
    store: MemoryStore,
    clock: Clock,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = retention(store, clock)
    store.upkeep.used = Usage(file=1, wal=0, free=0, events=10**9, blobs=0, blob_bytes=0, incremental=True)

    async def remove(removal: Any) -> Removed:
        await trio.sleep(1.0)
        return Removed(events=1000, size=10**9)

    monkeypatch.setattr(store.upkeep, "remove", remove)
    with trio.fail_after(120):
        await one.look()


async def test_free_pages_are_given_back_when_they_are_many(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    one = retention(store, clock)
    store.upkeep.used = Usage(
        file=10**9, wal=0, free=10**8, events=0, blobs=0, blob_bytes=0, incremental=True
    )
    await one.look()
    assert "vacuum" not in store.upkeep.done, "a tenth of the file is room for what comes"
    store.upkeep.used = Usage(
        file=10**9, wal=0, free=5 * 10**8, events=0, blobs=0, blob_bytes=0, incremental=True
    )
    found = await one.look()
    assert "vacuum" in store.upkeep.done
    assert store.upkeep.done[-1] == "checkpoint"
    assert found.freed_bytes > 4 * 10**8


async def test_a_vacuum_ends_in_time_and_says_what_is_left(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    one = retention(store, clock)
    store.upkeep.used = Usage(
        file=10**10, wal=0, free=9 * 10**9, events=0, blobs=0, blob_bytes=0, incremental=True
    )
    found = await one.vacuum(1.0)
    assert 0.9 <= found["seconds"] <= 1.5
    assert found["free_bytes"] > 0
    store.upkeep.used = Usage(
        file=10**9, wal=0, free=10**8, events=0, blobs=0, blob_bytes=0, incremental=False
    )
    store.upkeep.done.clear()
    assert (await one.vacuum(1.0))["incremental"] is False
    assert "vacuum" not in store.upkeep.done


async def test_statistics_tell_the_last_pass_and_all_of_them(store: MemoryStore, clock: Clock) -> None:
    one = retention(store, clock)
    assert (await one.statistics())["retention"]["last"] is None
    store.upkeep.answers = [Removed(results=2, blobs=["a"])]
    await one.look()
    await one.look()
    found = await one.statistics()
    assert found["retention"]["passes"] == 2
    assert found["retention"]["last"]["results"] == 0
    assert found["retention"]["total"]["results"] == 2
    assert found["store"]["file_bytes"] == 8192


async def test_there_is_no_rest_while_a_flood_outruns_it(
    store: MemoryStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async def seconds(events: int) -> float:
        one = retention(store, clock, result_ttl=None, **(NOTHING | {"event_bytes": 1000}))
        store.upkeep.used = Usage(
            file=1, wal=0, free=0, events=events, blobs=0, blob_bytes=0, incremental=True
        )
        store.upkeep.answers = [
            Removed(),
            *[Removed(events=1, size=1, more=True)] * 100,
        ]  # the first: of tickets
        started = trio.current_time()
        await one.look()
        return trio.current_time() - started

    assert await seconds(1050) > 0.1
    assert await seconds(2000) == 0.0


# --- what the engine remembers of what was removed ----------------------------------------------------------


async def ended(g: Gate, made: Submission) -> RunRow:
    """Return a run that has ended, and that Django knows to have."""
    run, _ = await g.engine.submit(made)
    run = await g.engine.cancel(run, None)
    await g.engine.decide(lambda: g.engine.book.told(run.id, run.no, run.version))
    return run


async def test_a_key_that_was_removed_can_be_used_anew(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        first = await ended(g, submission(key="k", digest=b"one"))
        removed = await g.store.upkeep.remove(OldKeys(time.time() + 1))
        assert removed.keys == 1
        with pytest.raises(IdempotencyConflict):
            await g.engine.submit(submission(key="k", digest=b"two"))  # a moment ago: it may be on its way
        g.engine._acceptance._key_memory = 0.0
        second, replayed = await g.engine.submit(submission(key="k", digest=b"two"))
        assert not replayed
        assert second.id != first.id
        with pytest.raises(IdempotencyConflict):  # of an open run it counts however old it is
            await g.engine.submit(submission(key="k", digest=b"three"))


async def test_a_run_that_was_removed_a_moment_ago_is_no_answer(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        made = submission()
        await ended(g, made)
        assert (await g.store.upkeep.remove(OldRuns(time.time() + 1))).runs == 1
        with pytest.raises(NotWritable, match="was removed"):
            await g.engine.submit(made)
