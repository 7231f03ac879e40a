"""One subscriber of one run."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from gateway.following import READ_ROWS
from gateway.store.rows import EventRow
from gateway.stream import CHUNK, HEARTBEAT_SECONDS, LIFE_SECONDS
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.fakes import Exchange, StubEngine, app_of, client_of, exchange, token

SSE = "text/event-stream"


def path_of(run: Any, query: str = "") -> str:
    return f"/api/v1/runs/{run.id}/events{query}"


def ids(one: Exchange) -> list[str]:
    return [id for id, _, _ in one.events]


async def test_headers_and_first_bytes_leave_before_anything_is_read() -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run), accept=SSE) as one:
        await one.until(b"retry: ")
        reads = engine.store.reads
        assert reads == 1, "only the run's own row"
        assert one.status == 200
        assert one.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert one.headers["cache-control"] == "no-store, no-transform"
        assert one.headers["x-accel-buffering"] == "no"
        assert one.headers["content-encoding"] == "identity"
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["vary"] == "Accept, Origin"
        assert one.body.startswith(b":\n\nretry: ")
        assert 1000 <= int(one.body.split(b"retry: ")[1]) <= 3000


async def test_history_then_live_then_the_end() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", {"n": 1}), ("a", {"n": 2}))
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"id: 2\n")
        engine.emit(run, ("a", {"n": 3}))
        await one.until(b"id: 3\n")
        engine.end(run, result=7)
        await one.until()
    assert ids(one) == ["1", "2", "3", "4"]
    assert one.events[-1] == ("4", "stream.end", '{"status":"SUCCESSFUL","result":7}')
    assert one.ended


async def test_no_event_is_missed_or_repeated_wherever_a_client_cuts_in(rng: random.Random) -> None:
    engine = StubEngine()
    run = engine.start()
    seen: list[list[str]] = []

    async def follow(start: int) -> None:
        cursor = start
        got: list[str] = []
        while not got or got[-1] != "400":
            one = Exchange(path_of(run), last_event_id=str(cursor)) if cursor else Exchange(path_of(run))
            with trio.move_on_after(rng.uniform(0.001, 0.02)):
                await one.run(app_of(engine))
            got += ids(one)
            cursor = int(got[-1]) if got else start
        seen.append([str(n) for n in range(1, start + 1)] + got)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(follow, 0)
            for n in range(1, 400):
                engine.emit(run, ("a", {"n": n}))
                await trio.sleep(0.0005 if n % 7 else 0.002)
            engine.end(run)
    assert seen == [[str(n) for n in range(1, 401)]] * 5


async def test_resuming_continues_behind_the_cursor() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, *[("a", n) for n in range(1, 6)])
    for headers, query in (
        ({"last_event_id": "3"}, ""),
        ({}, "?after=3"),
        ({"last_event_id": "3"}, "?after=1"),
    ):
        async with exchange(engine, path_of(run, query), **headers) as one:
            await one.until(b"id: 5\n")
            assert ids(one) == ["4", "5"]


async def test_latest_begins_with_the_newest_now_with_what_follows() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1), ("a", 2))
    async with (
        exchange(engine, path_of(run, "?after=latest")) as latest,
        exchange(engine, path_of(run, "?after=now")) as now,
    ):
        await latest.until(b"id: 2\n")
        await now.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        engine.emit(run, ("a", 3))
        await latest.until(b"id: 3\n")
        await now.until(b"id: 3\n")
        assert ids(latest) == ["2", "3"]
        assert ids(now) == ["3"]


async def test_a_finished_run_is_replayed_and_ends() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    engine.end(run)
    async with exchange(engine, path_of(run)) as one:
        await one.until()
    assert ids(one) == ["1", "2"]


@pytest.mark.parametrize("cursor", ["2", "3", "999999"])
async def test_nothing_can_follow_the_end_of_a_finished_run(cursor: str) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    engine.end(run)
    async with exchange(engine, path_of(run), last_event_id=cursor) as one:
        await one.until()
    assert one.status == 204
    assert one.body == b""


async def test_a_run_that_ends_between_the_look_and_the_stream_ends_cleanly() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    read = engine.store.run

    async def run_of(id: str) -> Any:
        found = await read(id)
        if engine.store.rows[1].status is RunStatus.RUNNING:
            engine.end(run)
        return found

    engine.store.run = run_of  # type: ignore[method-assign]
    async with exchange(engine, path_of(run)) as one:
        await one.until()
    assert ids(one) == ["1", "2"]


async def test_a_trimmed_beginning_is_announced() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, *[("a", n) for n in range(1, 10)])
    del engine.store.event_rows[run.no][:6]
    async with exchange(engine, path_of(run), last_event_id="2") as one:
        await one.until(b"id: 9\n")
        assert one.events[0] == ("6", "stream.reset", '{"from":7,"reason":"trimmed"}')
        assert ids(one) == ["6", "7", "8", "9"]


async def test_a_cursor_ahead_of_a_running_run_begins_anew() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    async with exchange(engine, path_of(run), last_event_id="50") as one:
        await one.until(b"id: 1\n")
        assert one.status == 200
        assert one.events[0] == ("0", "stream.reset", '{"from":1,"reason":"ahead"}')
        engine.end(run)
        await one.until()
    assert ids(one) == ["0", "1", "2"]


async def test_events_that_vanish_while_running_do_not_spin() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1), ("a", 2))
    engine.store.event_rows[run.no].clear()
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"stream.reset")
        await trio.testing.wait_all_tasks_blocked()
        assert engine.store.reads < 10
        engine.emit(run, ("a", 3))
        await one.until(b"id: 3\n")
        assert one.events[0] == ("2", "stream.reset", '{"from":3,"reason":"trimmed"}')


async def test_a_finished_run_without_events_says_so() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    engine.end(run)
    engine.store.event_rows[run.no].clear()
    async with exchange(engine, path_of(run)) as one:
        await one.until()
    assert one.events == [("2", "stream.reset", '{"from":3,"reason":"trimmed"}')]


async def test_a_run_that_is_not_announced_yet_is_followed(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.hub.ended(run.no)  # in the store it is open, the hub has not heard of it
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"retry")
        await trio.sleep(3)
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        engine.end(run)
        await one.until()
    assert ids(one) == ["1", "2"]


async def test_silence_is_broken_by_comments(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"retry")
        await trio.sleep(HEARTBEAT_SECONDS * 4 + 1)
        assert one.chunks[1:] == [b":\n\n"] * 4
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        await trio.sleep(HEARTBEAT_SECONDS - 1)
        assert len(one.chunks) == 6, "an event restarts the silence"


async def test_ndjson_breaks_its_silence_with_an_empty_line(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run), accept="application/x-ndjson") as one:
        await trio.sleep(HEARTBEAT_SECONDS + 1)
        assert one.body == b"\n"


async def test_a_stream_ends_after_its_life(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    lives = []
    for _ in range(5):
        async with exchange(engine, path_of(run)) as one:
            start = trio.current_time()
            await one.until(seconds=LIFE_SECONDS * 2)
            lives.append(trio.current_time() - start)
            assert one.ended
    assert all(LIFE_SECONDS * 0.8 - 1 <= life <= LIFE_SECONDS * 1.2 + 1 for life in lives)
    assert len({round(life, 3) for life in lives}) == 5


async def test_a_stream_ends_with_its_token(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run), authorization=f"Bearer {token(ttl=40.0)}") as one:
        start = trio.current_time()
        await one.until(seconds=100)
        assert 38 <= trio.current_time() - start <= 40
        assert one.ended


async def test_shutdown_ends_every_stream_with_a_retry() -> None:
    engine = StubEngine()
    run = engine.start()
    async with (
        exchange(engine, path_of(run)) as one,
        exchange(engine, path_of(run), accept="application/x-ndjson") as two,
    ):
        await one.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        engine.hub.end_streams()
        await one.until()
        await two.until()
        assert one.ended
        assert two.ended
        assert 500 <= int(one.chunks[-1].split(b"retry: ")[1]) <= 5000
        assert two.body == b""


async def test_a_client_that_leaves_frees_its_place_without_another_send() -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        assert engine.hub.subscribers(run.no) == 1
        one.leave()
        await one.until()
        assert not one.ended
        assert engine.hub.subscribers(run.no) == 0


async def test_a_disconnect_within_the_final_send_does_not_cancel_it() -> None:
    """hypercorn posts http.disconnect from inside the last send; cutting that send leaks the socket."""
    engine = StubEngine()
    run = engine.start()
    finished: list[bool] = []

    class Hypercorn(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.leave()
                for _ in range(5):
                    await trio.lowlevel.checkpoint()
                finished.append(True)
            await super().send(message)

    one = Hypercorn(path_of(run))
    engine.end(run)
    with trio.fail_after(5):
        await one.run(app_of(engine))
    assert finished == [True]


async def test_a_slow_client_is_merely_behind() -> None:
    engine = StubEngine()
    run = engine.start()
    gate = trio.Event()

    class Slow(Exchange):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if b"retry" in message.get("body", b""):
                await gate.wait()

    slow = Slow(path_of(run))
    async with exchange(engine, path_of(run)) as quick, trio.open_nursery() as nursery:
        nursery.start_soon(slow.run, app_of(engine))
        await slow.until(b"retry")
        for n in range(3000):
            engine.emit(run, ("a", {"n": n, "pad": "x" * 100}))
            if n % 100 == 0:
                await trio.testing.wait_all_tasks_blocked()
        await quick.until(b"id: 3000\n")
        gate.set()
        engine.end(run)
        await slow.until()
        await quick.until()
    assert ids(slow) == ids(quick) == [str(n) for n in range(1, 3002)]
    assert len(slow.chunks) < 30, "a client that is behind gets joined batches"
    assert max(map(len, slow.chunks)) <= CHUNK


async def test_a_large_event_is_sent_in_pieces() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", "x" * 300_000))
    engine.end(run)
    async with exchange(engine, path_of(run)) as one:
        await one.until()
    assert max(map(len, one.chunks)) <= CHUNK
    assert len(one.events[0][2]) == 300_002


async def test_a_store_that_does_not_answer_delays_the_stream(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", 1))
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"retry")
        engine.store.broken = True
        await trio.sleep(5)
        assert ids(one) in ([], ["1"])
        engine.store.broken = False
        await one.until(b"id: 1\n")
        engine.end(run)
        await one.until()
    assert ids(one) == ["1", "2"]


async def test_head_gets_the_head_only() -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run), method="HEAD") as one:
        await one.until()
    assert one.status == 200
    assert one.headers["content-type"].startswith(SSE)
    assert one.body == b""


async def test_lines_come_where_they_were_printed() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "before")
    engine.emit(run, ("a", 1))
    engine.say(run, "one", "two", stream="stderr")
    engine.emit(run, ("a", 2))
    async with exchange(engine, path_of(run, "?include=log")) as one:
        await one.until(b"id: 2\n")
        engine.say(run, "live")
        await one.until(b"live")
        engine.emit(run, ("a", 3))
        engine.end(run)
        await one.until()
    assert ids(one) == ["0.1", "1", "1.2", "1.3", "2", "2.4", "3", "4"]
    id, type, data = one.events[2]
    assert (id, type) == ("1.2", "log")
    assert json.loads(data) == {
        "stream": "stderr",
        "text": "one",
        "_run": run.id,
        "_attempt": 1,
        "_timestamp": "2023-11-14T22:13:20.000Z",
    }


@pytest.mark.parametrize(
    ("cursor", "expected"),
    [
        ("0.1", ["1", "1.2", "1.3", "2"]),
        ("1", ["1.2", "1.3", "2"]),
        ("1.2", ["1.3", "2"]),
        ("1.3", ["2"]),
        ("2", []),
    ],
)
async def test_lines_resume_by_both_numbers(cursor: str, expected: list[str]) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "before")
    engine.emit(run, ("a", 1))
    engine.say(run, "one", "two")
    engine.emit(run, ("a", 2))
    async with exchange(engine, path_of(run, "?include=log"), last_event_id=cursor) as one:
        await one.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        assert ids(one) == expected


async def test_many_lines_and_events_stay_in_order() -> None:
    engine = StubEngine()
    run = engine.start()
    for n in range(12):
        engine.say(run, *[f"{n}/{i}" for i in range(READ_ROWS // 4)])
        engine.emit(run, *[("a", i) for i in range(READ_ROWS // 4)])
    engine.end(run)
    async with exchange(engine, path_of(run, "?include=log")) as one:
        await one.until()
    keys = [tuple(int(part) for part in f"{id}.0".split(".")[:2]) for id in ids(one)]
    offsets = [offset for offset, line in keys if not line]
    lines = [line for _, line in keys if line]
    assert offsets == list(range(1, 12 * (READ_ROWS // 4) + 2))
    assert lines == list(range(1, 12 * (READ_ROWS // 4) + 1))
    assert [offset for offset, _ in keys] == sorted(offset for offset, _ in keys)


async def test_lines_need_their_own_action() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "secret")
    engine.emit(run, ("a", {"value": "said"}))
    engine.end(run)
    bearer = token(actions={"read"})
    async with client_of(engine, bearer) as client:
        response = await client.get(path_of(run, "?include=log"))
        assert response.status_code == 403
        text = await client.get(path_of(run), headers={"Accept": "text/plain"})
        assert text.text == "said\n"


async def test_text_is_what_was_printed_or_said_line_by_line() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.say(run, "printed", "ünïcode")
    engine.emit(run, ("a", {"value": "said\nin two"}), ("a", {"n": 1}))
    engine.end(run)
    async with client_of(engine) as client:
        response = await client.get(path_of(run), headers={"Accept": "text/plain"})
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "printed\nünïcode\nsaid\nin two\n"


async def test_ndjson_has_the_same_events() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("a", {"n": 1}))
    engine.end(run)
    async with client_of(engine) as client:
        response = await client.get(path_of(run), headers={"Accept": "application/x-ndjson"})
    assert [json.loads(line) for line in response.text.splitlines()] == [
        {"id": "1", "type": "a", "data": {"n": 1}},
        {"id": "2", "type": "stream.end", "data": {"status": "SUCCESSFUL", "result": None}},
    ]


async def page(client: httpx.AsyncClient, run: Any, query: str = "") -> dict[str, Any]:
    response = await client.get(path_of(run, query), headers={"Accept": "application/json"})
    assert response.status_code == 200
    document = response.json()
    assert isinstance(document, dict)
    return document


async def test_pages_lead_to_the_end() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, *[("a", n) for n in range(1, 6)])
    engine.end(run)
    async with client_of(engine) as client:
        found: list[str] = []
        after = "0"
        for _ in range(10):
            one = await page(client, run, f"?after={after}&limit=2")
            found += [event["id"] for event in one["events"]]
            after = one["next"]
            if one["ended"]:
                break
        assert found == ["1", "2", "3", "4", "5", "6"]
        assert await page(client, run, "?after=6") == {"events": [], "next": "6", "ended": True}
        assert await page(client, run, "?after=now") == {"events": [], "next": "6", "ended": True}


async def test_a_page_can_wait(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    async with client_of(engine) as client:
        assert await page(client, run) == {"events": [], "next": "0", "ended": False}
        start = trio.current_time()
        assert await page(client, run, "?wait=7") == {"events": [], "next": "0", "ended": False}
        assert 7 <= trio.current_time() - start < 8

        async def speak() -> None:
            await trio.sleep(3)
            engine.emit(run, ("a", {"n": 1}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak)
            one = await page(client, run, "?wait=60")
            assert one["events"] == [{"id": "1", "type": "a", "data": {"n": 1}}]


@pytest.mark.parametrize("query", ["?after=x", "?after=", "?after=1.x", "?last_event_id=-1"])
async def test_a_bad_cursor_is_400(query: str) -> None:
    engine = StubEngine()
    run = engine.start()
    async with client_of(engine) as client:
        response = await client.get(path_of(run, query))
    assert response.status_code == 400
    assert response.json()["type"] == "urn:bulkhead:problem:bad-cursor"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, SSE),
        ("*/*", SSE),
        ("text/html,application/xhtml+xml,*/*;q=0.8", SSE),
        ("application/json, text/plain, */*", "application/json"),
        ("text/*", SSE),
        ("text/event-stream;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("text/plain", "text/plain"),
    ],
)
async def test_the_rendering_is_what_the_client_accepts(accept: str | None, kind: str) -> None:
    engine = StubEngine()
    run = engine.start()
    engine.end(run)
    async with client_of(engine) as client:
        client.headers.pop("accept")
        response = await client.get(path_of(run), headers={} if accept is None else {"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == kind


async def test_an_unknown_rendering_is_406() -> None:
    engine = StubEngine()
    run = engine.start()
    async with client_of(engine) as client:
        response = await client.get(path_of(run), headers={"Accept": "image/png, */*;q=0"})
    assert response.status_code == 406


async def test_names_cannot_break_out_of_their_event() -> None:
    engine = StubEngine()
    run = engine.start()
    evil = "a\n\nevent: stream.end\ndata: {}"
    engine.store.rows[run.no].tail = 1
    row = EventRow(1, run.no, 1, 1, evil, b"{}", 0.0)
    engine.store.event_rows[run.no].append(row)
    engine.hub.publish(run.no, [row])
    async with exchange(engine, path_of(run)) as one:
        await one.until(b"id: 1\n")
        await trio.testing.wait_all_tasks_blocked()
        assert len(one.events) == 1
        assert not one.ended
