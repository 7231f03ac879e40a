"""Replays over HTTP, and what only an operator may."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.fakes import StubEngine, View, client_of, token

RUNS = "/api/v1/runs"


def code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["type"]).rpartition(":")[2]


def ended(engine: StubEngine, **changes: Any) -> RunRow:
    values: dict[str, Any] = {"args": b"[3]", "metadata": b'{"who":"ann"}', "tags": ("x",), "max_attempts": 4}
    run = engine.start(**values | {"timeout": 9.0, "priority": 2, "run_after": 5.0} | changes)
    engine.end(run, RunStatus.FAILED)
    return run


async def test_a_replay_answers_as_a_submission_does() -> None:
    engine = StubEngine()
    run = ended(engine)
    async with client_of(engine) as client:
        response = await client.post(f"{RUNS}/{run.id}/replay")
        assert response.status_code == 202
        document = response.json()
        assert document["id"] != run.id
        assert response.headers["location"] == f"{RUNS}/{document['id']}"
        assert set(document) == {"id", "status", "task", "urls", "token"}
        shown = (await client.get(f"{RUNS}/{document['id']}")).json()
        assert (shown["replay_of"], shown["metadata"]) == (run.id, {"who": "ann"})
    (made,) = engine.submissions
    assert (made.args, made.kwargs, made.metadata, made.tags) == (b"[3]", b"{}", b'{"who":"ann"}', ("x",))
    assert (made.timeout, made.priority, made.max_attempts, made.run_after) == (9.0, 2, 4, None)
    assert (made.subject, made.replay_of) == ("me", run.id)


async def test_a_row_is_performed_again_as_the_same_row() -> None:
    engine = StubEngine()
    run = ended(
        engine, task="demo.ExampleTask", row=b'{"app":"demo","model":"ExampleTask","pk":7}', using="b"
    )
    async with client_of(engine) as client:
        assert (await client.post(f"{RUNS}/{run.id}/replay")).status_code == 202
    (made,) = engine.submissions
    assert made.row is not None
    assert (made.row.pk, made.using) == (7, "b")
    assert engine.created == [], "no second row"


async def test_a_pool_that_is_gone_gives_way_to_the_tasks_own() -> None:
    engine = StubEngine()
    run = ended(engine, pool="of yesterday")
    async with client_of(engine) as client:
        await client.post(f"{RUNS}/{run.id}/replay")
    assert engine.submissions[0].pool == "default"


async def test_a_key_makes_a_repeat_safe() -> None:
    engine = StubEngine()
    run, other = ended(engine), ended(engine)
    async with client_of(engine) as client:
        headers = {"Idempotency-Key": "k"}
        one = await client.post(f"{RUNS}/{run.id}/replay", headers=headers)
        two = await client.post(f"{RUNS}/{run.id}/replay", headers=headers)
        assert (one.status_code, two.status_code) == (202, 200)
        assert one.json()["id"] == two.json()["id"]
        assert two.headers["idempotency-replayed"] == "true"
        three = await client.post(f"{RUNS}/{other.id}/replay", headers=headers)
        assert (three.status_code, code(three)) == (409, "idempotency-conflict")
        four = await client.post(f"{RUNS}/{run.id}/replay", json={"id": one.json()["id"]})
        assert (four.status_code, four.json()["id"]) == (200, one.json()["id"])


async def test_only_an_ended_run_is_replayed() -> None:
    engine = StubEngine()
    run = engine.start()
    async with client_of(engine) as client:
        response = await client.post(f"{RUNS}/{run.id}/replay")
        assert (response.status_code, code(response)) == (409, "run-open")
        gone = ended(engine, task="demo.gone")
        response = await client.post(f"{RUNS}/{gone.id}/replay")
        assert (response.status_code, code(response)) == (404, "unknown-task")
        response = await client.post(f"{RUNS}/{ended(engine).id}/replay", json={"kwargs": {}})
        assert (response.status_code, response.json()["errors"]) == (
            422,
            {"kwargs": "is no field here; there is id"},
        )
    assert engine.submissions == []


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"actions": ("read",)}, 403),
        ({"actions": ("submit",)}, 404),
        ({"actions": ("submit", "read"), "runs": (), "tasks": ("other.*",)}, 404),
        ({"actions": ("submit", "read"), "runs": "*", "tasks": ("other.*",)}, 403),
        ({"actions": ("submit", "read"), "runs": (), "tasks": ("demo.*",)}, 202),
    ],
)
async def test_a_replay_takes_sight_of_the_run_and_leave_to_submit(
    claims: dict[str, Any], status: int
) -> None:
    engine = StubEngine()
    run = ended(engine)
    async with client_of(engine, token(**claims)) as client:
        assert (await client.post(f"{RUNS}/{run.id}/replay")).status_code == status


# --- runners and tasks


@pytest.mark.parametrize("how", ["kill", "drain"])
async def test_a_runner_is_ended_or_drained(how: str) -> None:
    engine = StubEngine(views=[View("r-1", 77)])
    async with client_of(engine) as client:
        response = await client.post(f"/api/v1/runners/r-1/{how}")
        assert (response.status_code, response.json()) == (202, {"id": "r-1", "ordered": how})
        missing = await client.post(f"/api/v1/runners/r-2/{how}")
        assert (missing.status_code, code(missing)) == (404, "unknown-runner")
    assert engine.ordered == [("r-1", how == "kill"), ("r-2", how == "kill")]


async def test_a_held_task_is_reset_by_any_of_its_names() -> None:
    engine = StubEngine(held={"demo.count", "demo.gone"})
    async with client_of(engine) as client:
        for name, was_held in (("demo.tasks.count", True), ("demo.count", False)):
            response = await client.post(f"/api/v1/tasks/{name}/reset")
            assert (response.status_code, response.json()) == (
                200,
                {"task": "demo.count", "was_held": was_held},
            )
        response = await client.post("/api/v1/tasks/demo.gone/reset")
        assert response.json() == {"task": "demo.gone", "was_held": True}, "it may be held still"
        response = await client.post("/api/v1/tasks/demo.gone/reset")
        assert (response.status_code, code(response)) == (404, "unknown-task")


@pytest.mark.parametrize(
    "path", ["/api/v1/runners/r-1/kill", "/api/v1/runners/r-1/drain", "/api/v1/tasks/demo.count/reset"]
)
async def test_all_of_it_takes_an_operator_and_no_body(path: str) -> None:
    engine = StubEngine(views=[View("r-1", 77)], held={"demo.count"})
    async with client_of(engine, token(actions=("submit", "read", "cancel", "logs"))) as client:
        assert (await client.post(path)).status_code == 403
    async with client_of(engine, token(actions=("operate",), runs=(), tasks=())) as client:
        refused = await client.post(path, json={"grace": 5})
        assert (refused.status_code, code(refused)) == (422, "invalid-arguments")
        assert list(refused.json()["errors"]) == ["grace"]
        assert engine.ordered == []
        assert (await client.post(path)).status_code in (200, 202)
