"""The seed's routes for results, on the gateway."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus
from taskkit.settings import AsyncRequestSettings, Settings
from tests.unit.gateway.fakes import StubEngine, client_of, token

ANSWER = {"status": 201, "headers": [["A", "b"]], "endpoint": "/x/?y", "response": {"a": 1}}
CHANNEL = "a-channel-of-nobody"


async def get(engine: StubEngine, run: RunRow | str, query: str = "", bearer: str | None = None) -> Any:
    id = run if isinstance(run, str) else run.id
    async with client_of(engine, bearer) as client:
        return await client.get(f"/api/v1/async_background_response/{id}/{query}")


def request_of(engine: StubEngine, **changes: Any) -> RunRow:
    return engine.start("taskkit.request", kwargs=b'{"id":"1","method":"GET","path":"/x/?y"}', **changes)


async def test_it_is_told_when_the_run_has_ended() -> None:
    engine = StubEngine()
    run = request_of(engine)
    assert (await get(engine, run)).json() == {"status": "not ready"}
    full = (await get(engine, run, "?full_response=true")).json()
    assert full == {"status": "processing", "channel_name": run.subject, "response": None}
    engine.end(run, result=ANSWER)
    assert (await get(engine, run)).json() == {"task_id": run.id, **ANSWER}


async def test_a_failed_one_names_its_endpoint() -> None:
    engine = StubEngine()
    run = request_of(engine)
    engine.end(run, RunStatus.FAILED)
    found = (await get(engine, run)).json()
    assert (found["status"], found["endpoint"]) == (500, "/x/?y")
    assert found["response"] == {"error": "boom"}


@pytest.mark.parametrize("result", [3, None, [1], "text"])
async def test_runs_of_other_tasks_have_their_result_told(result: Any) -> None:
    engine = StubEngine()
    run = engine.start("demo.echo", kwargs=b'{"path":3}')
    engine.end(run, result=result)
    found = (await get(engine, run)).json()
    assert (found["status"], found["endpoint"], found["response"]) == (200, "", result)


async def test_it_is_told_to_its_owner_only() -> None:
    engine = StubEngine(settings=Settings(async_request=AsyncRequestSettings(anonymous=True)))
    run = request_of(engine, subject=f"anon:{CHANNEL}")
    assert (await get(engine, run, bearer=CHANNEL)).status_code == 200
    assert (await get(engine, run, bearer=CHANNEL[::-1])).status_code == 403
    assert (await get(engine, run, bearer=token(subject="7", runs="own", tasks=()))).status_code == 403
    assert (await get(engine, run, bearer="short")).status_code == 401
    assert (await get(engine, "0" * 32)).status_code == 404
    assert (await get(engine, run, "?full_response=maybe")).status_code == 400


async def test_without_the_setting_a_channel_s_name_is_no_token() -> None:
    engine = StubEngine()
    run = request_of(engine, subject=f"anon:{CHANNEL}")
    assert (await get(engine, run, bearer=CHANNEL)).status_code == 401
