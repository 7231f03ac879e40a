"""Many runs on one connection: one order, one cursor."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from gateway import changes, merging
from gateway.fanout import RING_BYTES
from gateway.lagging import BEHIND_SECONDS
from gateway.store.rows import Mix, Place, RunRow
from gateway.stream import HEARTBEAT_SECONDS, LIFE_SECONDS
from taskkit.lifecycle import RunStatus
from taskkit.settings import LimitSettings, Settings
from tests.unit.gateway.fakes import Exchange, StubEngine, app_of, client_of, exchange, token

NDJSON = "application/x-ndjson"


def path_of(*runs: RunRow, tags: Sequence[str] = (), query: str = "") -> str:
    chosen = [f"run={run.id}" for run in runs] + [f"tag={tag}" for tag in tags] + [query] * bool(query)
    return f"/api/v1/events?{'&'.join(chosen)}"


def ids(one: Exchange) -> list[str]:
    return [id for id, _, _ in one.events]


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_history_then_live_in_one_order() -> None:
    engine = StubEngine()
    a, b, other = engine.start(), engine.start(), engine.start()
    engine.emit(a, ("x", 1))
    engine.emit(b, ("x", 2))
    engine.emit(other, ("x", 3))
    engine.emit(a, ("x", 4))
    async with exchange(engine, path_of(a, b)) as one:
        await one.until(b"id: 4\n")
        assert one.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert one.headers["x-accel-buffering"] == "no"
        assert one.body.startswith(b":\n\nretry: ")
        engine.emit(b, ("x", 5))
        engine.emit(other, ("x", 6))
        engine.emit(a, ("x", 7), ("x", 8))
        await one.until(b"id: 8\n")
    assert [(id, data) for id, _, data in one.events] == [(n, n) for n in ("1", "2", "4", "5", "7", "8")]


async def test_a_cursor_of_one_choice_continues_any_other() -> None:
    engine = StubEngine()
    a, b = engine.start(tags=("t",)), engine.start()
    for run in (a, b, a, b, a):
        engine.emit(run, ("x", 1))
    for path, headers, expected in (
        (path_of(a, b), {"last_event_id": "2"}, ["3", "4", "5"]),
        (path_of(b), {"last_event_id": "3"}, ["4"]),
        (path_of(tags=["t"]), {"last_event_id": "3"}, ["5"]),
        (path_of(b, tags=["t"], query="after=4"), {}, ["5"]),
        (path_of(a, query="after=1"), {"last_event_id": "4"}, ["5"]),
    ):
        async with exchange(engine, path, **headers) as one:
            await settle()
            assert ids(one) == expected, path


async def test_ndjson_has_the_same() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()
    engine.emit(b, ("x", {"n": 1}))
    engine.emit(a, ("y", {"n": 2}))
    async with exchange(engine, path_of(a, b), accept=NDJSON) as one:
        await settle()
        assert one.headers["content-type"] == NDJSON
    assert [json.loads(line) for line in one.body.splitlines()] == [
        {"id": "1", "type": "x", "data": {"n": 1}},
        {"id": "2", "type": "y", "data": {"n": 2}},
    ]


async def test_now_is_what_is_new_latest_begins_with_the_newest_of_each() -> None:
    engine = StubEngine()
    a, b, silent = (engine.start(tags=("t",)) for _ in range(3))
    over = engine.start(tags=("t",))
    engine.emit(a, ("x", 1), ("x", 2))
    engine.emit(b, ("x", 3))
    engine.end(over)
    async with (
        exchange(engine, path_of(a, b, silent, query="after=now")) as now,
        exchange(engine, path_of(a, over, silent, tags=["t"], query="after=latest")) as latest,
        exchange(engine, path_of(tags=["t"], query="after=latest")) as tagged,
    ):
        await settle()
        assert (ids(now), ids(latest), ids(tagged)) == ([], ["2", "3", "4"], ["2", "3"])
        engine.emit(silent, ("x", 5))
        engine.emit(a, ("x", 6))
        await settle()
        assert (ids(now), ids(latest)) == (["5", "6"], ["2", "3", "4", "5", "6"])


async def test_the_end_of_one_run_ends_nothing_unless_it_is_the_last_awaited() -> None:
    engine = StubEngine()
    a, b, tagged = engine.start(), engine.start(), engine.start(tags=("t",))
    async with (
        exchange(engine, path_of(a, b, tags=["t"])) as forever,
        exchange(engine, path_of(a, b, tags=["t"], query="until=done")) as awaited,
    ):
        await settle()
        engine.end(a)
        await settle()
        assert not awaited.ended
        engine.emit(tagged, ("x", 1))
        engine.end(b)
        await awaited.until()
        await settle()
        assert awaited.ended
        assert not forever.ended
    assert ids(awaited) == ids(forever) == ["1", "2", "3"]


async def test_coming_back_to_what_is_done_is_204() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start(tags=("t",))
    engine.end(a)
    engine.end(b)
    engine.emit(engine.start(), ("x", 1))
    for query, status in (
        ("after=2", 204),
        ("after=3", 204),
        ("after=now", 204),
        ("after=1", 200),
        ("after=0", 200),
        ("after=latest", 200),
        ("after=99", 200),
    ):
        async with exchange(engine, path_of(a, b, query=f"until=done&{query}")) as one:
            await one.until()
            assert one.status == status, query
            assert one.ended
    async with exchange(engine, path_of(a, b, query="after=2")) as one:
        await settle()
        assert (one.status, one.ended) == (200, False), "without until=done nothing is ever over"


async def test_runs_that_end_before_the_first_look_end_the_stream_too() -> None:
    engine = StubEngine()
    a = engine.start()
    look = engine.store.places

    async def ends_first(mix: Mix, after: int, limit: int) -> tuple[list[Place], int | None]:
        found = await look(mix, after, limit)
        if engine.store.rows[1].finished_at is None:
            engine.end(a)
        return found

    engine.store.places = ends_first  # type: ignore[method-assign]
    async with exchange(engine, path_of(a, query="until=done&after=now")) as one:
        await one.until()
    assert one.ended


async def test_a_tag_takes_in_runs_that_are_accepted_later() -> None:
    engine = StubEngine()
    ended, opened = engine.start(tags=("t",)), engine.start(tags=("t", "u"))
    engine.end(ended)
    async with exchange(engine, path_of(tags=["t"])) as one:
        await settle()
        engine.start(tags=("other",))
        later = engine.start(tags=("t",))
        engine.emit(later, ("x", 2))
        engine.emit(opened, ("x", 3))
        engine.end(later)
        await settle()
        assert ids(one) == ["1", "2", "3", "4"]
        another = engine.start(tags=("u", "t"))
        await settle()
        engine.emit(another, ("x", 5))
        await settle()
        assert ids(one) == ["1", "2", "3", "4", "5"]


async def test_a_run_that_is_accepted_and_ends_in_one_round_is_not_missed() -> None:
    """Its events are published before anybody hears of it; the horizon waits for that."""
    engine = StubEngine()
    async with exchange(engine, path_of(tags=["t"])) as one:
        await settle()
        row = RunRow(no=1, id="01890a5d-ac96-774b-bcce-000000000001", task="demo.count", tags=("t",))
        engine.store.rows[1] = row
        (event,) = engine.commit(row, ("stream.end", {}))
        engine.hub.publish(1, [event])
        await settle()
        assert ids(one) == []
        engine.hub.opened(1, 0)
        engine.hub.ended(1)
        engine.changes.publish([row])
        engine.hub.settled(event.pos)
        await settle()
        assert ids(one) == ["1"]


async def test_what_is_published_first_waits_for_what_has_a_lower_position() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()
    async with exchange(engine, path_of(a, b)) as one:
        await settle()
        first, second = engine.commit(a, ("x", 1)), engine.commit(b, ("x", 2))
        engine.hub.publish(b.no, second)
        await settle()
        assert ids(one) == []
        engine.hub.publish(a.no, first)
        await settle()
        assert ids(one) == []
        engine.hub.settled(2)
        await settle()
        assert ids(one) == ["1", "2"]


async def test_a_store_that_is_ahead_of_what_is_published_is_waited_for() -> None:
    """A round is committed, then published; who comes in between finds a run that has ended, and not its end."""
    engine = StubEngine()
    run = engine.start(tags=("t",))
    engine.emit(run, ("x", 1))
    engine.store.rows[run.no].status = RunStatus.SUCCESSFUL
    events = engine.commit(run, ("x", 2), ("stream.end", {}))
    async with (
        exchange(engine, path_of(tags=["t"])) as tagged,
        exchange(engine, path_of(run, query="until=done&after=now")) as named,
    ):
        await settle()
        assert (ids(tagged), ids(named), named.ended) == (["1"], [], False)
        engine.publish(events)
        engine.hub.ended(run.no)
        await settle()
        assert (ids(tagged), ids(named), named.ended) == (["1", "2", "3"], ["2", "3"], True)


async def test_who_missed_new_runs_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_WAITING", 3)
    engine = StubEngine()
    async with exchange(engine, path_of(tags=["t"])) as one:
        await settle()
        runs = [engine.start(tags=("t",)) for _ in range(10)]
        for run in runs:
            engine.emit(run, ("x", 1))
        await settle()
        assert ids(one) == [str(n) for n in range(1, 11)]


async def test_a_tag_with_a_long_past_is_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WINDOW", 2)
    engine = StubEngine()
    runs = [engine.start(tags=("t",)) for _ in range(9)]
    for _ in range(3):
        for run in runs:
            engine.emit(run, ("x", 1))
    for run in runs[::-1]:
        engine.end(run)
    live = engine.start(tags=("t",))
    async with exchange(engine, path_of(tags=["t"])) as one:
        await settle()
        engine.emit(live, ("x", 1))
        await settle()
        assert ids(one) == [str(n) for n in range(1, 38)]


# --- reach


async def test_a_run_out_of_reach_is_as_unknown_as_none() -> None:
    engine = StubEngine()
    mine, others = engine.start(), engine.start()
    nobody = "01890a5d-ac96-774b-bcce-999999999999"
    problems = []
    async with client_of(engine, token(runs=[mine.id], tasks=())) as client:
        for id in (others.id, nobody):
            response = await client.get(f"{path_of(mine)}&run={id}")
            assert response.status_code == 404
            problems.append({k: str(v).replace(id, "ID") for k, v in response.json().items()})
        assert (await client.post("/api/v1/events", json={"runs": [others.id]})).status_code == 404
    assert problems[0] == problems[1]
    assert problems[0]["type"] == "urn:bulkhead:problem:unknown-run"
    assert problems[0]["run"] == "ID"


async def test_members_of_a_tag_out_of_reach_are_left_out_without_a_word() -> None:
    engine = StubEngine()
    mine, others = engine.start(tags=("t",)), engine.start(tags=("t",))
    ours = engine.start(tags=("t",), task="shop.sell")
    bearer = f"Bearer {token(runs=[mine.id], tasks=('shop.*',))}"
    async with exchange(engine, path_of(tags=["t"]), authorization=bearer) as one:
        for run in (others, mine, ours):
            engine.emit(run, ("x", 1))
        await settle()
        later = engine.start(tags=("t",), task="shop.buy"), engine.start(tags=("t",))
        for run in later:
            engine.emit(run, ("x", 1))
        await settle()
        assert ids(one) == ["2", "3", "4"]


async def test_it_needs_a_token_that_may_read() -> None:
    engine = StubEngine()
    run = engine.start()
    async with client_of(engine, "") as client:
        assert (await client.get(path_of(run))).status_code == 401
    async with client_of(engine, token(actions={"submit"})) as client:
        assert (await client.get(path_of(run))).status_code == 403
        assert (await client.post("/api/v1/events", json={"runs": [run.id]})).status_code == 403


# --- where it begins anew


async def test_a_cursor_of_events_that_never_were_begins_anew() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("x", 1), ("x", 2))
    async with exchange(engine, path_of(run), last_event_id="3") as one:
        await settle()
        assert one.events[0] == ("0", "stream.reset", '{"from":1,"reason":"ahead"}')
        assert ids(one) == ["0", "1", "2"]


async def test_a_cursor_of_events_that_a_power_cut_took_begins_anew() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.emit(run, ("x", 1), ("x", 2))
    engine.hub.gaps = [(2, 1000)]
    engine.position = 1000
    engine.emit(run, ("x", 3))
    for cursor, expected in (("2", ["1001"]), ("1000", ["1001"]), ("1", ["2", "1001"])):
        async with exchange(engine, path_of(run), last_event_id=cursor) as one:
            await settle()
            assert ids(one) == expected, "it has seen nothing that was lost"
    for cursor in ("3", "999"):
        async with exchange(engine, path_of(run, query="until=done"), last_event_id=cursor) as one:
            await settle()
            assert one.events[0] == ("0", "stream.reset", '{"from":1,"reason":"epoch"}')
            assert ids(one) == ["0", "1", "2", "1001"]


async def test_a_run_whose_events_were_removed_is_named() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()
    for run in (a, b, a, b, a, b):
        engine.emit(run, ("x", 1))
    del engine.store.event_rows[a.no][:2]
    async with exchange(engine, path_of(a, b), last_event_id="1") as one:
        await settle()
    assert one.events == [
        ("2", "x", "1"),
        ("4", "x", "1"),
        (
            "4",
            "stream.reset",
            json.dumps({"from": 5, "reason": "trimmed", "_run": a.id}, separators=(",", ":")),
        ),
        ("5", "x", "1"),
        ("6", "x", "1"),
    ], "the cursor stays as it was"
    async with exchange(engine, path_of(a, b), last_event_id="5") as one:
        await settle()
        assert ids(one) == ["6"]


async def test_a_run_that_retention_removes_meanwhile_is_over() -> None:
    engine = StubEngine()
    a = engine.start()
    engine.emit(a, ("x", 1))
    engine.end(a)
    look = engine.store.merged

    async def removed(heads: Sequence[tuple[int, int]], *bounds: int) -> Any:
        engine.store.event_rows[a.no].clear()
        return await look(heads, *bounds)

    engine.store.merged = removed  # type: ignore[assignment]
    async with exchange(engine, path_of(a, query="until=done")) as one:
        await one.until()
    assert one.ended


# --- what it shares with the stream of one run


async def test_types_are_filtered_and_the_cursor_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()
    async with exchange(engine, path_of(a, b, query="types=y")) as one:
        await settle()
        engine.emit(a, ("x", 1))
        engine.emit(b, ("y", 2), ("x", 3))
        engine.end(b)
        engine.emit(engine.start(), ("x", 5))
        await settle()
        assert one.events == [("2", "y", "2"), ("4", "stream.end", '{"status":"SUCCESSFUL","result":null}')]
        await trio.sleep(2 * HEARTBEAT_SECONDS + 1)
        assert one.chunks[-2:] == [b":\n\nid: 5\n\n", b":\n\n"], "also behind what is of others"


async def test_it_ends_with_its_life_its_token_and_the_gateway(
    autojump_clock: trio.testing.MockClock,
) -> None:
    engine = StubEngine()
    run = engine.start()
    start = trio.current_time()
    async with exchange(engine, path_of(run), authorization=f"Bearer {token(ttl=40.0)}") as one:
        await one.until(seconds=100)
        assert 38 <= trio.current_time() - start <= 40
    start = trio.current_time()
    async with exchange(engine, path_of(run)) as one:
        await one.until(seconds=2 * LIFE_SECONDS)
        assert 0.8 * LIFE_SECONDS - 1 <= trio.current_time() - start <= 1.2 * LIFE_SECONDS + 1
    async with exchange(engine, path_of(run)) as one:
        await settle()
        engine.hub.end_streams()
        await one.until(seconds=1)
        assert b"retry: " in one.chunks[-1]
        assert one.ended


async def test_who_leaves_is_gone_from_every_run() -> None:
    engine = StubEngine()
    named, tagged = engine.start(), engine.start(tags=("t",))
    async with exchange(engine, path_of(named, tags=["t"])) as one:
        await settle()
        assert engine.hub.subscribers(named.no) == 1
        assert engine.hub.subscribers(tagged.no) == 0, (
            "whoever follows a tag follows no run of it in particular"
        )
        assert engine.hub.statistics()["multiplexed"] == 1
        assert engine.changes.watchers == 1
        one.leave()
        await one.until()
    counts = engine.hub.statistics()
    assert (counts["subscribers"], counts["multiplexed"], counts["ring_events"]) == (0, 0, 0)
    assert not engine.changes.watched


async def test_ended_runs_are_let_go_of() -> None:
    engine = StubEngine()
    async with exchange(engine, path_of(tags=["t"])) as one:
        await settle()
        for _ in range(20):
            engine.end(engine.start(tags=("t",)))
        await settle()
        assert len(one.events) == 20
        assert engine.hub.statistics()["runs"] == 0


async def test_a_store_that_does_not_answer_delays_it(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start(tags=("t",))
    engine.emit(run, ("x", 1))
    async with exchange(engine, path_of(tags=["t"])) as one:
        await one.until(b"retry")
        engine.store.broken = True
        await trio.sleep(5)
        later = engine.start(tags=("t",))
        engine.emit(later, ("x", 2))
        await trio.sleep(5)
        engine.store.broken = False
        await trio.sleep(5)
        assert ids(one) == ["1", "2"]


async def test_an_event_larger_than_a_ring_comes_from_the_store() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()
    async with exchange(engine, path_of(a, b)) as one:
        await settle()
        engine.emit(a, ("x", "y" * RING_BYTES))
        engine.emit(b, ("x", 2))
        await settle()
        engine.emit(a, ("x", 3))
        await settle()
    assert ids(one) == ["1", "2", "3"]


class Stalling(Exchange):
    """A client whose line stands still while `open` is not set."""

    open = trio.Event()

    async def send(self, message: dict[str, Any]) -> None:
        await super().send(message)
        if b"event: " in message.get("body", b""):
            await self.open.wait()


@asynccontextmanager
async def stalling(engine: StubEngine, path: str) -> AsyncIterator[Stalling]:
    one = Stalling(path)
    one.open = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, app_of(engine))
        await settle()
        yield one
        nursery.cancel_scope.cancel()


async def test_who_falls_behind_is_spared_progress_by_run(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start()

    def progress(run: RunRow) -> tuple[str, Any]:
        return "run.progress", {"_run": run.id}

    async with stalling(engine, path_of(a, b)) as one:
        engine.emit(a, ("x", 1))
        await settle()
        engine.emit(a, progress(a), progress(a))
        engine.emit(b, progress(b))
        engine.emit(a, ("x", 5), progress(a))
        await trio.sleep(BEHIND_SECONDS + 0.1)
        one.open.set()
        await settle()
    assert [(id, type) for id, type, _ in one.events] == [
        ("1", "x"),
        ("1", "stream.lag"),
        ("4", "run.progress"),
        ("5", "x"),
        ("6", "run.progress"),
    ]
    assert json.loads(one.events[1][2]) == {"skipped": 2, "_run": a.id}


# --- how it is asked


class Posted(Exchange):
    """A POST with a body."""

    def __init__(self, body: dict[str, Any], **headers: str) -> None:
        super().__init__("/api/v1/events", "POST", **headers)
        self._body = json.dumps(body).encode()

    async def receive(self) -> dict[str, Any]:
        message = await super().receive()
        return message | {"body": self._body} if message["type"] == "http.request" else message


async def test_a_body_says_the_same_as_a_query() -> None:
    engine = StubEngine()
    a, b = engine.start(), engine.start(tags=("t",))
    for run in (a, b, a):
        engine.emit(run, ("x", 1), ("y", 2))
    bodies: list[tuple[dict[str, Any], list[str]]] = [
        ({"runs": [a.id, b.id]}, ["1", "2", "3", "4", "5", "6"]),
        ({"runs": [a.id], "tags": ["t"], "types": ["y"], "after": "2"}, ["4", "6"]),
        ({"runs": [a.id], "after": 2, "until": "done"}, ["5", "6"]),
        ({"runs": [a.id], "after": "latest"}, ["6"]),
        ({"runs": [a.id], "tags": None, "types": None, "after": None, "until": None}, ["1", "2", "5", "6"]),
    ]
    for body, expected in bodies:
        one = Posted(body)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, app_of(engine))
            await settle()
            nursery.cancel_scope.cancel()
        assert ids(one) == expected, body
    resumed = Posted({"runs": [a.id]}, last_event_id="5")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resumed.run, app_of(engine))
        await settle()
        nursery.cancel_scope.cancel()
    assert ids(resumed) == ["6"]


@pytest.mark.parametrize(
    ("query", "code", "parameter"),
    [
        ("", "bad-parameter", "run"),
        ("run=", "bad-parameter", "run"),
        ("run=7", "bad-parameter", "run"),
        ("tag=", "bad-parameter", "tag"),
        (f"tag={'x' * 101}", "bad-parameter", "tag"),
        ("tag=t&types=", "bad-parameter", "types"),
        ("tag=t&until=later", "bad-parameter", "until"),
        ("tag=t&until=done", "bad-parameter", "until"),
        ("tag=t&wait=3", "bad-parameter", "wait"),
        ("tag=t&include=log", "bad-parameter", "include"),
        ("tag=t&after=", "bad-cursor", None),
        ("tag=t&after=e1-3", "bad-cursor", None),
        ("tag=t&after=3.4", "bad-cursor", None),
        ("tag=t&after=-1", "bad-cursor", None),
    ],
)
async def test_a_malformed_query_is_400_and_names_the_part(
    query: str, code: str, parameter: str | None
) -> None:
    async with client_of(StubEngine()) as client:
        response = await client.get(f"/api/v1/events?{query}")
    assert response.status_code == 400
    assert response.json()["type"] == f"urn:bulkhead:problem:{code}"
    assert response.json().get("parameter") == parameter


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "runs"),
        ({"runs": "x"}, "runs"),
        ({"runs": ["x"]}, "runs"),
        ({"runs": [1]}, "runs"),
        ({"tags": [""]}, "tags"),
        ({"tags": ["t"], "types": ["a\nb"]}, "types"),
        ({"tags": ["t"], "types": "a"}, "types"),
        ({"tags": ["t"], "after": 1.5}, "after"),
        ({"tags": ["t"], "after": True}, "after"),
        ({"tags": ["t"], "until": "done"}, "until"),
        ({"tags": ["t"], "until": 3}, "until"),
        ({"tags": ["t"], "run": []}, "run"),
    ],
)
async def test_a_malformed_body_is_422_and_names_the_field(body: dict[str, Any], field: str) -> None:
    async with client_of(StubEngine()) as client:
        response = await client.post("/api/v1/events", json=body)
    assert response.status_code == 422
    assert [*response.json()["errors"]] == [field]


async def test_too_many_are_413_with_the_remedy() -> None:
    engine = StubEngine(settings=Settings(limits=LimitSettings(streams_per_connection=3)))
    runs = [engine.start() for _ in range(4)]
    async with client_of(engine) as client:
        for response in (
            await client.get(path_of(*runs)),
            await client.post("/api/v1/events", json={"runs": [run.id for run in runs]}),
            await client.get(path_of(*runs[:2], tags=["t", "u"])),
        ):
            assert response.status_code == 413
            assert response.json()["type"] == "urn:bulkhead:problem:too-many-runs"
            assert "tag" in response.json()["detail"]
            assert response.json()["max_streams"] == 3
    async with exchange(engine, path_of(*runs[:2], runs[0], tags=["t"])) as one:
        await settle()
        assert one.status == 200, "the same one counts once"


async def test_head_406_405() -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, path_of(run), method="HEAD") as one:
        await one.until()
        assert (one.status, one.body) == (200, b"")
    async with client_of(engine) as client:
        assert (await client.get(path_of(run), headers={"Accept": "application/json"})).status_code == 406
        assert (await client.delete(path_of(run))).status_code == 405


async def test_any_cut_and_any_choice_lose_nothing(rng: random.Random) -> None:
    """Clients of random choices are cut at random; what each has got is what it should have, once, in order."""
    engine = StubEngine()
    runs = [engine.start(tags=(rng.choice("tu"),)) for _ in range(4)]
    choices: list[tuple[list[RunRow], list[str]]] = [
        (runs[:2], []),
        (runs[1:], []),
        ([], ["t"]),
        ([runs[0]], ["u"]),
        ([], ["t", "u"]),
    ]
    got: list[list[str]] = [[] for _ in choices]
    over = trio.Event()

    async def follow(number: int) -> None:
        named, tags = choices[number]
        while not over.is_set():
            one = Exchange(path_of(*named, tags=tags), last_event_id=got[number][-1] if got[number] else "0")
            with trio.move_on_after(rng.uniform(0.001, 0.03)):
                await one.run(app_of(engine))
            one.chunks = [one.body[: one.body.rfind(b"\n\n") + 2]]
            got[number] += ids(one)

    async def speak() -> None:
        alive = list(runs)
        for n in range(300):
            if rng.random() < 0.1:
                runs.append(engine.start(tags=(rng.choice("tu"),)))
                alive.append(runs[-1])
            run = rng.choice(alive)
            if rng.random() < 0.05 and len(alive) > 1:
                alive.remove(run)
                engine.end(run)
            else:
                engine.emit(run, *[("x", n)] * rng.choice([1, 1, 3]))
            await trio.sleep(rng.choice([0, 0, 0.001, 0.003]))
        over.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(len(choices)):
                nursery.start_soon(follow, number)
            nursery.start_soon(speak)
    for (named, tags), seen in zip(choices, got, strict=True):
        async with exchange(engine, path_of(*named, tags=tags), last_event_id=seen[-1]) as rest:
            await settle()
            seen += ids(rest)
        mine = {run.no for run in runs if run in named or not set(tags).isdisjoint(run.tags)}
        assert seen == [
            str(pos) for pos in sorted(row.pos for no in mine for row in engine.store.event_rows[no])
        ]
