"""A position in a stream, when what it stands on has changed: epochs, trimmed beginnings."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from gateway.fanout import RING_EVENTS, Entry
from gateway.following import Follower, Line, Reset
from gateway.sse import Cursor, Origin
from gateway.store.rows import RunRow
from tests.unit.gateway.fakes import Exchange, StubEngine, app_of, client_of, exchange

SSE = "text/event-stream"


def path_of(run: RunRow, query: str = "") -> str:
    return f"/api/v1/runs/{run.id}/events{query}"


def said(epoch: int, events: int = 3, *, over: bool = False) -> tuple[StubEngine, RunRow]:
    """Return an engine with a run of this epoch that has said `events` events, and perhaps ended."""
    engine = StubEngine()
    run = engine.start(epoch=epoch)
    engine.emit(run, *[("tick", n) for n in range(1, events + 1)])
    if over:
        engine.end(run)
    return engine, engine.store.rows[run.no]


async def first(engine: StubEngine, run: RunRow, cursor: Cursor, *, output: bool = False) -> list[Any]:
    with engine.hub.attach(run.no, run.epoch) as subscription:
        return list(await Follower(engine.store, subscription, run, cursor, output=output).read())


async def test_ids_have_the_epoch_everywhere() -> None:
    engine, run = said(2)
    engine.say(run, "hello")
    engine.end(run)
    async with exchange(engine, path_of(run, "?include=log"), accept=SSE) as one:
        await one.until()
    assert [id for id, _, _ in one.events] == ["e2-1", "e2-2", "e2-3", "e2-3.1", "e2-4"]
    async with client_of(engine) as client:
        page = (await client.get(path_of(run, "?limit=2"), headers={"accept": "application/json"})).json()
        assert [event["id"] for event in page["events"]] == ["e2-1", "e2-2"]
        assert page["next"] == "e2-2"
        empty = (await client.get(path_of(run, "?after=e2-4"), headers={"accept": "application/json"})).json()
        assert (empty["events"], empty["next"], empty["ended"]) == ([], "e2-4", True)
        lines = (await client.get(path_of(run), headers={"accept": "application/x-ndjson"})).text.splitlines()
        assert lines[0].startswith('{"id":"e2-1",')
        snapshot = (await client.get(f"/api/v1/runs/{run.id}")).json()
        assert snapshot["offsets"] == {"first": 1, "last": 4, "cursor": "e2-4"}


async def test_live_events_have_it_too() -> None:
    engine, run = said(1)
    async with exchange(engine, path_of(run, "?after=now")) as one:
        await one.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        engine.emit(run, ("tick", 4))
        await one.until(b"id: e1-4\n")


@pytest.mark.parametrize(
    ("cursor", "reason"),
    [("2", "epoch"), ("e1-2", "epoch"), ("e1-3.4", "epoch"), ("e3-1", "ahead"), ("e2-9", "ahead")],
)
async def test_a_cursor_of_another_epoch_begins_anew_and_says_so(cursor: str, reason: str) -> None:
    engine, run = said(2)
    async with exchange(engine, path_of(run), last_event_id=cursor) as one:
        await one.until(b"id: e2-3\n")
        assert one.status == 200
        assert one.events[0] == ("e2-0", "stream.reset", f'{{"from":1,"reason":"{reason}"}}')
        assert [id for id, _, _ in one.events[1:]] == ["e2-1", "e2-2", "e2-3"]


@pytest.mark.parametrize("cursor", ["0", "e1-0", "e2-0", "e3-0"])
async def test_who_has_seen_nothing_needs_no_reset(cursor: str) -> None:
    engine, run = said(2)
    async with exchange(engine, path_of(run), last_event_id=cursor) as one:
        await one.until(b"id: e2-3\n")
        assert [id for id, _, _ in one.events] == ["e2-1", "e2-2", "e2-3"]


async def test_a_run_without_epoch_knows_cursors_of_none() -> None:
    engine, run = said(0)
    async with exchange(engine, path_of(run), last_event_id="e1-2") as one:
        await one.until(b"id: 3\n")
        assert one.events[0] == ("0", "stream.reset", '{"from":1,"reason":"ahead"}')


async def test_a_run_that_lost_everything_says_so_before_it_speaks() -> None:
    engine, run = said(1, events=0)
    async with exchange(engine, path_of(run), last_event_id="7") as one:
        await one.until(b"stream.reset")
        assert one.events == [("e1-0", "stream.reset", '{"from":1,"reason":"epoch"}')]
        engine.emit(run, ("tick", 1))
        await one.until(b"id: e1-1\n")


@pytest.mark.parametrize(
    ("cursor", "status"), [("e1-4", 204), ("e1-5", 204), ("e1-3", 200), ("4", 200), ("e2-4", 200)]
)
async def test_the_end_of_a_finished_run_is_known_by_its_own_epoch(cursor: str, status: int) -> None:
    engine, run = said(1, over=True)
    async with exchange(engine, path_of(run), last_event_id=cursor) as one:
        await one.until()
    assert one.status == status


async def test_a_reset_leads_to_the_first_event_that_is_kept() -> None:
    engine, run = said(1, events=9)
    engine.store.event_rows[run.no] = engine.store.event_rows[run.no][6:]
    pieces = await first(engine, run, Cursor(offset=3))
    assert pieces[0] == Reset(7, "epoch", 1)
    assert [piece.id for piece in pieces[1:] if isinstance(piece, Entry)] == ["e1-7", "e1-8", "e1-9"]


async def test_lines_begin_anew_with_the_epoch() -> None:
    engine, run = said(1)
    engine.say(run, "a", "b")
    pieces = await first(engine, engine.store.rows[run.no], Cursor(offset=3, line=2), output=True)
    assert [piece.id for piece in pieces if isinstance(piece, Line)] == ["e1-3.1", "e1-3.2"]


async def test_now_and_latest_need_no_epoch() -> None:
    engine, run = said(1)
    assert await first(engine, run, Cursor(origin=Origin.NOW)) == []
    (piece,) = await first(engine, run, Cursor(origin=Origin.LATEST))
    assert piece.id == "e1-3"


# -- trimmed


async def test_a_live_follower_that_falls_behind_what_is_kept_is_told() -> None:
    """Slower than the ring, then slower than retention: it hears of the hole, and goes on behind it."""
    engine, run = said(0)
    with engine.hub.attach(run.no) as subscription:
        follower = Follower(engine.store, subscription, run, Cursor())
        assert [piece.id for piece in await follower.read() if isinstance(piece, Entry)] == ["1", "2", "3"]
        engine.emit(run, *[("tick", n) for n in range(RING_EVENTS + 100)])
        rows = engine.store.event_rows[run.no]
        engine.store.event_rows[run.no] = rows[-(RING_EVENTS + 50) :]
        kept = engine.store.event_rows[run.no][0].offset
        assert kept > 4
        pieces = await follower.read()
        assert pieces[0] == Reset(kept, "trimmed")
        seen = [piece.offset for piece in pieces if isinstance(piece, Entry)]
        while seen[-1] < rows[-1].offset:
            seen += [piece.offset for piece in await follower.read() if isinstance(piece, Entry)]
        assert seen == list(range(kept, rows[-1].offset + 1))


async def test_what_the_ring_still_has_is_not_missed_in_the_store() -> None:
    engine, run = said(0)
    with engine.hub.attach(run.no) as subscription:
        follower = Follower(engine.store, subscription, run, Cursor(offset=3))
        engine.emit(run, *[("tick", n) for n in range(10)])
        engine.store.event_rows[run.no] = engine.store.event_rows[run.no][-1:]
        pieces = await follower.read()
        assert [piece.id for piece in pieces] == [str(n) for n in range(4, 14)]


async def test_a_run_that_is_removed_while_it_is_followed_ends() -> None:
    engine, run = said(0, over=True)
    one = Exchange(path_of(run), accept=SSE)
    with engine.hub.attach(run.no) as subscription, trio.fail_after(5):
        follower = Follower(engine.store, subscription, run, Cursor())
        del engine.store.rows[run.no]
        engine.store.event_rows.clear()
        while not follower.done:
            await follower.read()
    with trio.fail_after(5):
        await one.run(app_of(engine))
    assert one.status == 404
