"""Who falls behind is spared outdated progress and nothing else, and hears how much."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from gateway.fanout import RING_EVENTS, Entry
from gateway.lagging import BEHIND_SECONDS, Lag, Pace, Portion
from gateway.store.rows import EventRow
from tests.unit.gateway.fakes import Exchange, StubEngine, app_of

NDJSON = "application/x-ndjson"


def entry(offset: int, type: str = "run.progress", run: int = 1) -> Entry:
    data = msgspec.json.encode({"done": offset, "_run": f"run-{run}"})
    return Entry(EventRow(offset, run, offset, 1, type, data, 0.0))


def test_a_reader_of_history_is_never_behind() -> None:
    pace = Pace()
    assert not pace.behind(1e9, off_ring=True)


def test_who_was_level_is_behind_after_a_while_or_off_the_ring() -> None:
    pace = Pace()
    pace.level(100.0)
    assert not pace.behind(100.0 + BEHIND_SECONDS, off_ring=False)
    assert pace.behind(100.1 + BEHIND_SECONDS, off_ring=False)
    assert pace.behind(100.0, off_ring=True)
    pace.level(200.0)
    assert not pace.behind(200.1, off_ring=False)


def test_of_each_run_the_newest_progress_stays_in_its_place() -> None:
    portion: Portion[Entry] = Portion()
    portion.add([entry(1), entry(2, "a"), entry(3, run=2)])
    portion.add([entry(4), entry(5, "b"), entry(6), entry(7, "c")])
    lag, *kept = portion.pieces()
    assert lag == Lag("run-1", 2)
    assert [(piece.offset, piece.row.type) for piece in kept if isinstance(piece, Entry)] == [
        (2, "a"),
        (3, "run.progress"),
        (5, "b"),
        (6, "run.progress"),
        (7, "c"),
    ]
    assert portion.size == sum(len(piece.row.data) for piece in kept if isinstance(piece, Entry))


def test_without_anything_to_spare_nothing_is_said() -> None:
    portion: Portion[Entry] = Portion()
    portion.add([entry(1), entry(2, "a")])
    assert [type(piece) for piece in portion.pieces()] == [Entry, Entry]


class Stalling(Exchange):
    """A client whose line stands still while `open` is not set."""

    def __init__(self, path: str, **headers: str) -> None:
        super().__init__(path, **headers)
        self.open = trio.Event()
        self.open.set()

    async def send(self, message: dict[str, Any]) -> None:
        await super().send(message)
        if message.get("body"):
            await self.open.wait()

    def stall(self) -> None:
        self.open = trio.Event()


@asynccontextmanager
async def stalling(engine: StubEngine, run: Any, query: str = "", **headers: str) -> AsyncIterator[Stalling]:
    one = Stalling(f"/api/v1/runs/{run.id}/events{query}", **headers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, app_of(engine))
        await trio.testing.wait_all_tasks_blocked()
        yield one
        nursery.cancel_scope.cancel()


def said(one: Stalling) -> list[tuple[str, str]]:
    return [(id, type) for id, type, _ in one.events]


async def test_progress_that_a_newer_one_has_overtaken_is_left_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()
    async with stalling(engine, run) as one:
        one.stall()
        engine.emit(run, ("a", 1))  # on its way when the line stands still
        await one.until(b"id: 1\n")
        engine.emit(run, ("run.progress", 2), ("run.progress", 3), ("b", 4), ("run.progress", 5))
        await trio.sleep(BEHIND_SECONDS + 0.1)
        one.open.set()
        await one.until(b"id: 5\n")
        await trio.testing.wait_all_tasks_blocked()  # it is level again once it has found nothing more
        engine.emit(run, ("run.progress", 6), ("run.progress", 7))
        await one.until(b"id: 7\n")
    assert said(one) == [
        ("1", "a"),
        ("1", "stream.lag"),
        ("4", "b"),
        ("5", "run.progress"),
        ("6", "run.progress"),
        ("7", "run.progress"),
    ], "the announcement leaves the cursor alone; who is level again gets everything"
    assert json.loads(one.events[1][2]) == {"skipped": 2, "_run": run.id}


async def test_a_short_stall_costs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with stalling(engine, run) as one:
        one.stall()
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        engine.emit(run, *[("run.progress", n) for n in range(2, 50)])
        await trio.sleep(BEHIND_SECONDS - 0.5)
        one.open.set()
        await one.until(b"id: 49\n")
    assert said(one)[1:] == [(str(n), "run.progress") for n in range(2, 50)]


async def test_off_the_ring_only_the_newest_progress_is_sent_however_short_the_stall() -> None:
    engine = StubEngine()
    run = engine.start()
    async with stalling(engine, run) as one:
        one.stall()
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        engine.emit(run, *[("run.progress", n) for n in range(3 * RING_EVENTS)])
        one.open.set()
        engine.end(run)
        await one.until()
    newest = 3 * RING_EVENTS + 1
    assert said(one)[1:] == [
        ("1", "stream.lag"),
        (str(newest), "run.progress"),
        (str(newest + 1), "stream.end"),
    ]
    assert json.loads(one.events[1][2])["skipped"] == 3 * RING_EVENTS - 1


async def test_history_is_whole_however_long_it_takes(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, *[("run.progress", "x" * 100)] * 5_000)

    class Slow(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            await trio.sleep(BEHIND_SECONDS)
            await super().send(message)

    one = Slow(f"/api/v1/runs/{run.id}/events")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, app_of(engine))
        await trio.sleep(1)
        engine.emit(run, *[("run.progress", 1)] * 100)
        engine.end(run)
        await one.until(seconds=1000)
    assert [id for id, _, _ in one.events] == [str(n) for n in range(1, 5_102)]


async def test_ndjson_announces_it_without_an_id(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with stalling(engine, run, accept=NDJSON) as one:
        one.stall()
        engine.emit(run, ("a", 1))
        await one.until(b"}\n")
        engine.emit(run, ("run.progress", 2), ("run.progress", 3))
        await trio.sleep(BEHIND_SECONDS + 0.1)
        one.open.set()
        await one.until(b'"3"')
    assert [json.loads(line) for line in one.body.splitlines()][1:] == [
        {"type": "stream.lag", "data": {"skipped": 1, "_run": run.id}},
        {"id": "3", "type": "run.progress", "data": 3},
    ]


async def test_what_is_filtered_out_is_not_counted(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with stalling(engine, run, "?types=a") as one:
        one.stall()
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        engine.emit(run, *[("run.progress", 2)] * 10, ("a", 3))
        await trio.sleep(BEHIND_SECONDS + 0.1)
        one.open.set()
        await one.until(b"id: 12\n")
    assert said(one) == [("1", "a"), ("12", "a")]


@pytest.mark.parametrize("accept", ["text/event-stream", NDJSON])
async def test_under_random_stalls_everything_but_progress_arrives_once_in_order(
    autojump_clock: trio.testing.MockClock, rng: random.Random, accept: str
) -> None:
    """Cut and resumed as well: what is announced as skipped, and nothing else, is missing."""
    engine = StubEngine()
    run = engine.start()
    written: list[tuple[str, str]] = []

    async def speak() -> None:
        for _ in range(300):
            burst = rng.choices(["run.progress", "a", "b"], [6, 2, 1], k=rng.choice([1, 2, 5, 40]))
            engine.emit(run, *[(type, {"pad": "x" * rng.choice([1, 100, 3_000])}) for type in burst])
            written.extend((str(len(written) + 1), type) for type in burst)
            await trio.sleep(rng.uniform(0, 0.5))
        engine.end(run)

    got: list[tuple[str, str]] = []
    skipped = 0

    async def follow() -> None:
        nonlocal skipped
        while not got or got[-1][1] != "stream.end":
            cursor = got[-1][0] if got else "0"
            one = Stalling(f"/api/v1/runs/{run.id}/events", accept=accept, last_event_id=cursor)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.run, app_of(engine))
                for _ in range(rng.randrange(1, 12)):
                    await trio.sleep(rng.uniform(0, 3))
                    one.stall()
                    await trio.sleep(rng.choice([0.1, 1.0, 3.0, 8.0]))
                    one.open.set()
                nursery.cancel_scope.cancel()
            for id, type, data in events_of(one, accept):
                if type == "stream.lag":
                    skipped += json.loads(data)["skipped"]
                else:
                    got.append((id, type))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        nursery.start_soon(follow)
    written.append((str(len(written) + 1), "stream.end"))
    lost = set(written) - set(got)
    assert [one for one in got if one[1] != "run.progress"] == [
        one for one in written if one[1] != "run.progress"
    ]
    ids = [int(id) for id, _ in got]
    assert ids == sorted(set(ids)), "in order, nothing twice"
    assert {type for _, type in lost} <= {"run.progress"}
    assert 0 < len(lost) <= skipped, "each is announced (again, when it was cut off before its successor)"
    newest = [one for one in written if one[1] == "run.progress"][-1]
    assert newest in got


def events_of(one: Exchange, accept: str) -> list[tuple[str, str, str]]:
    """Return id, type, data of the complete events of a response that may have been cut."""
    if accept != NDJSON:
        one.chunks = [one.body[: one.body.rfind(b"\n\n") + 2]]
        return one.events
    lines = [json.loads(line) for line in one.body.split(b"\n")[:-1] if line]
    return [(line.get("id", ""), line["type"], json.dumps(line["data"])) for line in lines]
