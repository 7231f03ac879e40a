"""The routes of django-streaming-coordinator."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from gateway.seed import OUTCOME_SECONDS
from gateway.store.rows import RunRow
from gateway.stream import LIFE_SECONDS
from taskkit.errors import NotWritable
from taskkit.lifecycle import RunStatus
from taskkit.settings import Settings
from taskkit.wire.messages import Answer, Row
from tests.unit.gateway.fakes import StubEngine, client_of, exchange, token

PATH = "/stream/demo/ExampleTask/1"
SSE = "text/event-stream"


def found(completed_at: str | None = None, final_value: bytes = b"null") -> Answer:
    row = Row(app="demo", model="ExampleTask", pk=1)
    return Answer(
        ask="1",
        status="found",
        task="demo.ExampleTask",
        row=row,
        completed_at=completed_at,
        final_value=final_value,
    )


def engine_with_run(**changes: Any) -> tuple[StubEngine, RunRow]:
    engine = StubEngine(answer=found(), **changes)
    return engine, engine.start("demo.ExampleTask", row_key="demo.exampletask:1")


async def get(engine: StubEngine, path: str = PATH, bearer: str | None = None, **headers: str) -> Any:
    async with client_of(engine, bearer) as client:
        return await client.get(path, headers={"Accept": "*/*", **headers})


@pytest.mark.parametrize("accept", ["*/*", SSE, "application/json"])
@pytest.mark.parametrize("path", [PATH, "/stream/exampletask/1"])
async def test_a_running_row_streams_whatever_is_accepted(path: str, accept: str) -> None:
    engine, run = engine_with_run()
    engine.emit(run, ("start", {"message": "hi"}))
    async with exchange(engine, path, accept=accept) as one:
        await one.until(b"id: 1\n")
        engine.emit(run, ("complete", {"message": "hi"}))
        engine.end(run, result="x")
        await one.until()
    assert [type for _, type, _ in one.events] == ["start", "complete", "stream.end"]


async def test_its_stream_has_no_end_of_life(autojump_clock: trio.testing.MockClock) -> None:
    engine, run = engine_with_run()
    async with exchange(engine, PATH, accept=SSE) as one:
        await trio.sleep(LIFE_SECONDS * 2)
        assert not one.ended
        engine.end(run)
        await one.until()


async def test_a_completed_row_is_json() -> None:
    engine, run = engine_with_run()
    engine.end(run)
    engine.answer = found("2026-01-01T00:00:00+00:00", b'{"a":1}')
    response = await get(engine)
    assert response.status_code == 200
    assert response.json() == {
        "status": "completed",
        "final_value": {"a": 1},
        "completed_at": "2026-01-01T00:00:00+00:00",
    }


async def test_a_row_that_was_not_marked_takes_the_word_of_its_run() -> None:
    engine, run = engine_with_run()
    engine.end(run, result=5)
    document = (await get(engine)).json()
    assert document == {"status": "completed", "final_value": 5, "completed_at": "2023-11-14T22:15:00.000Z"}


async def test_a_completed_row_is_replayed_to_who_asks_for_a_stream() -> None:
    engine, run = engine_with_run()
    engine.emit(run, ("a", 1))
    engine.end(run)
    engine.answer = found("2026-01-01T00:00:00+00:00")
    async with exchange(engine, PATH, accept=SSE) as one:
        await one.until()
        assert [id for id, _, _ in one.events] == ["1", "2"]
    assert (await get(engine, accept=SSE, last_event_id="2")).status_code == 200  # httpx sends no underscores
    assert (await get(engine, **{"Accept": SSE, "Last-Event-ID": "2"})).status_code == 204


async def test_a_failed_row_is_not_started_again() -> None:
    engine, run = engine_with_run(settings=Settings(start_on_connect=True))
    engine.end(run, RunStatus.FAILED)
    for _ in range(3):
        response = await get(engine)
        assert response.json() == {"status": "failed", "error": {"code": "raised", "message": "boom"}}
        assert response.status_code == 200
        assert "stream.end" in (await get(engine, Accept=SSE)).text
    assert engine.submissions == []


async def test_a_late_client_may_ask_for_the_newest_event() -> None:
    engine, run = engine_with_run()
    engine.emit(run, ("a", 1), ("a", 2))
    async with exchange(engine, f"{PATH}?replay=latest", accept=SSE) as one:
        await one.until(b"id: 2\n")
        assert [id for id, _, _ in one.events] == ["2"]
    async with exchange(engine, f"{PATH}?replay=latest", accept=SSE, last_event_id="0") as one:
        await one.until(b"id: 2\n")
        assert [id for id, _, _ in one.events] == ["1", "2"]
    assert (await get(engine, f"{PATH}?replay=first")).status_code == 400


async def test_complete_sent_is_worth_a_short_wait(autojump_clock: trio.testing.MockClock) -> None:
    engine, run = engine_with_run()
    engine.emit(run, ("complete", {}))

    async def finish() -> None:
        await trio.sleep(0.5)
        engine.answer = found("2026-01-01T00:00:00+00:00", b"7")
        engine.end(run, result=7)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        response = await get(engine)
    assert response.json()["final_value"] == 7


async def test_the_wait_for_the_outcome_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    engine, run = engine_with_run()
    engine.emit(run, ("complete", {}))
    start = trio.current_time()
    async with exchange(engine, PATH, accept="application/json") as one:
        await one.until(b"id: 1\n")
        assert OUTCOME_SECONDS <= trio.current_time() - start < OUTCOME_SECONDS + 0.5
        assert one.headers["content-type"].startswith(SSE)
    async with exchange(engine, PATH, accept=SSE) as one:
        start = trio.current_time()
        await one.until(b"id: 1\n")
        assert trio.current_time() - start < 0.1


async def test_a_row_completed_without_a_run() -> None:
    engine = StubEngine(answer=found("2026-01-01T00:00:00+00:00", b"3"))
    assert (await get(engine)).json()["final_value"] == 3
    replay = await get(engine, Accept=SSE)
    assert replay.headers["content-type"].startswith(SSE)
    assert 'id: 1\nevent: stream.end\ndata: {"status":"SUCCESSFUL","result":3}\n\n' in replay.text
    assert (await get(engine, **{"Accept": SSE, "Last-Event-ID": "1"})).status_code == 204


async def test_a_row_that_never_ran_is_409() -> None:
    engine = StubEngine(answer=found())
    for accept in ("*/*", SSE):
        response = await get(engine, Accept=accept)
        assert response.status_code == 409
        assert response.json()["type"].endswith(":not-started")


async def test_a_get_may_start_it_when_that_is_switched_on() -> None:
    engine = StubEngine(answer=found(), settings=Settings(start_on_connect=True))
    async with client_of(engine) as client:
        assert (await client.head(PATH)).status_code == 200
        assert engine.submissions == []
    reader = token(actions={"read"})
    assert (await get(engine, bearer=reader)).status_code == 409
    async with exchange(engine, PATH, accept=SSE) as one:
        await one.until(b"retry")
        run = engine.store.rows[1]
        engine.emit(run, ("a", 1))
        await one.until(b"id: 1\n")
        async with exchange(engine, PATH, accept=SSE) as two:
            await two.until(b"id: 1\n")
    assert len(engine.submissions) == 1
    assert engine.submissions[0].timeout == 7.0
    assert run.row_key == "demo.exampletask:1"


@pytest.mark.parametrize(
    ("status", "code", "name"),
    [
        ("unknown", 404, "unknown-row"),
        ("bad_pk", 400, "bad-primary-key"),
        ("ambiguous", 409, "ambiguous-model"),
        ("away", 503, "not-writable"),
    ],
)
async def test_rows_that_cannot_be_had(status: str, code: int, name: str) -> None:
    response = await get(StubEngine(answer=Answer(ask="1", status=status)))
    assert (response.status_code, response.json()["type"]) == (code, f"urn:bulkhead:problem:{name}")
    if code == 404:
        assert response.json()["title"] == "Task not found"


async def test_a_courier_that_is_away_is_503() -> None:
    engine = StubEngine()

    async def ask(app: str, model: str, pk: str) -> Answer:
        raise NotWritable("the courier is away", retry_after=1.0)

    engine.ask = ask  # type: ignore[method-assign]
    assert (await get(engine)).status_code == 503


async def test_a_row_beyond_the_token_is_as_unknown_as_none() -> None:
    engine, run = engine_with_run()
    foreign = await get(engine, bearer=token(runs=(), tasks=("other.*",)))
    nobody = await get(StubEngine(), bearer=token(runs=(), tasks=("other.*",)))
    assert foreign.status_code == 404
    assert foreign.json() == nobody.json()
    engine.end(run)
    assert (await get(engine, bearer=token(runs=(run.id,), tasks=()))).status_code == 200
    assert (await get(engine, bearer=token(actions=("submit",)))).status_code == 403
    assert (await get(engine, bearer="")).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_only_get_and_head(method: str) -> None:
    async with client_of(StubEngine(answer=found())) as client:
        response = await client.request(method, PATH)
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD, OPTIONS"


async def test_head_answers_without_a_body() -> None:
    engine, _ = engine_with_run()
    async with exchange(engine, PATH, method="HEAD", accept=SSE) as one:
        await one.until()
    assert one.status == 200
    assert one.body == b""
