"""A stream of chosen types: the same ids with gaps, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from gateway.stream import HEARTBEAT_SECONDS
from tests.unit.gateway.fakes import StubEngine, client_of, exchange, token

NDJSON = "application/x-ndjson"


def path_of(run: Any, query: str = "") -> str:
    return f"/api/v1/runs/{run.id}/events{query}"


def spoken() -> tuple[StubEngine, Any]:
    """Return an engine with a run that has ended: a, b, a, c, stream.end."""
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1), ("b", {"value": "said"}), ("a", 3), ("c", 4))
    engine.end(run)
    return engine, run


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("?types=a", ["1", "3", "5"]),
        ("?types=a,c", ["1", "3", "4", "5"]),
        ("?types=a&types=c", ["1", "3", "4", "5"]),
        ("?types=nothing", ["5"]),
        ("?types=a&after=1", ["3", "5"]),
    ],
)
async def test_ids_stay_and_the_end_is_always_there(query: str, ids: list[str]) -> None:
    engine, run = spoken()
    async with exchange(engine, path_of(run, query)) as one:
        await one.until()
    assert [id for id, _, _ in one.events] == ids
    async with client_of(engine) as client:
        lines = (await client.get(path_of(run, query), headers={"Accept": NDJSON})).text.splitlines()
        page = (await client.get(path_of(run, query), headers={"Accept": "application/json"})).json()
    assert [json.loads(line)["id"] for line in lines] == ids
    assert [event["id"] for event in page["events"]] == ids


async def test_text_has_lines_as_a_type_of_their_own() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "printed")
    engine.emit(run, ("a", {"value": "said"}), ("b", {"value": "unsaid"}))
    engine.end(run)
    async with client_of(engine) as client:
        for query, text in (
            ("?types=a", "said\n"),
            ("?types=log", "printed\n"),
            ("?types=a,log", "printed\nsaid\n"),
            ("?types=a&include=log", "printed\nsaid\n"),
        ):
            response = await client.get(path_of(run, query), headers={"Accept": "text/plain"})
            assert response.text == text, query


async def test_whoever_includes_lines_gets_them_whatever_the_types() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "printed")
    engine.emit(run, ("a", 1), ("b", 2))
    engine.end(run)
    async with exchange(engine, path_of(run, "?types=b&include=log")) as one:
        await one.until()
    assert [id for id, _, _ in one.events] == ["0.1", "2", "3"]


async def test_a_reset_is_always_delivered() -> None:
    engine, run = spoken()
    del engine.store.event_rows[run.no][:2]
    async with exchange(engine, path_of(run, "?types=c")) as one:
        await one.until()
    assert [type for _, type, _ in one.events] == ["stream.reset", "c", "stream.end"]


async def test_heartbeats_flow_while_everything_is_filtered_and_carry_the_cursor(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run, "?types=rare")) as one:
        await one.until(b"retry")
        for _ in range(70):
            engine.emit(run, ("common", 1))
            await trio.sleep(1)
        assert one.chunks[1:] == [b":\n\nid: %d\n\n" % (HEARTBEAT_SECONDS * n) for n in (1, 2, 3, 4)], (
            "the client need not come back to what it does not see"
        )
        assert one.events == [], "a block without data dispatches nothing"


async def test_nothing_is_said_of_a_cursor_that_the_client_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run, "?types=a")) as one:
        await one.until(b"retry")
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        await trio.sleep(HEARTBEAT_SECONDS + 1)
        assert one.chunks[-1] == b":\n\n"


async def test_who_waits_for_what_is_new_is_given_a_cursor_to_come_back_with(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1), ("a", 2))
    async with exchange(engine, path_of(run, "?after=now")) as one:
        await trio.sleep(2 * HEARTBEAT_SECONDS + 1)
        assert one.chunks[1:] == [b":\n\nid: 2\n\n", b":\n\n"]


async def page(client: Any, run: Any, query: str) -> dict[str, Any]:
    response = await client.get(path_of(run, query), headers={"Accept": "application/json"})
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_a_page_goes_on_behind_what_it_does_not_show() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1), ("b", 2), ("a", 3), ("b", 4), ("b", 5))
    async with client_of(engine) as client:
        first = await page(client, run, "?types=a&limit=1")
        assert ([event["id"] for event in first["events"]], first["next"]) == (["1"], "1")
        second = await page(client, run, "?types=a&limit=1&after=1")
        assert ([event["id"] for event in second["events"]], second["next"]) == (["3"], "5")
        assert await page(client, run, "?types=a&after=5") == {"events": [], "next": "5", "ended": False}
        assert await page(client, run, "?types=z") == {"events": [], "next": "5", "ended": False}


async def test_a_page_reads_through_a_long_history_that_it_does_not_show() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, *[("b", "x" * 100)] * 5_000, ("a", 1))
    async with client_of(engine) as client:
        found = await page(client, run, "?types=a")
    assert [event["id"] for event in found["events"]] == ["5001"]


async def test_a_waiting_page_is_not_woken_by_what_it_does_not_show(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()

    async def speak() -> None:
        for _ in range(5):
            await trio.sleep(1)
            engine.emit(run, ("b", 1))
        engine.emit(run, ("a", 2))

    async with client_of(engine) as client, trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        start = trio.current_time()
        found = await page(client, run, "?types=a&wait=30")
        assert [event["id"] for event in found["events"]] == ["6"]
        assert 5 <= trio.current_time() - start < 6
        start = trio.current_time()
        nursery.start_soon(speak)
        found = await page(client, run, "?types=c&wait=8")
        assert 8 <= trio.current_time() - start < 9
        assert found == {"events": [], "next": "12", "ended": False}


@pytest.mark.parametrize("query", ["?types=", "?types=a,,b", "?types=a&types=", "?types=%0a"])
@pytest.mark.parametrize("accept", ["text/event-stream", "application/json", NDJSON, "text/plain"])
async def test_malformed_types_are_400_and_named(query: str, accept: str) -> None:
    engine, run = spoken()
    async with client_of(engine) as client:
        response = await client.get(path_of(run, query), headers={"Accept": accept})
    assert response.status_code == 400
    assert response.json()["parameter"] == "types"


async def test_types_open_no_way_to_lines() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "secret")
    engine.end(run)
    async with client_of(engine, token(actions={"read"})) as client:
        text = await client.get(path_of(run, "?types=log"), headers={"Accept": "text/plain"})
        assert text.text == ""
