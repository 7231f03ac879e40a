"""Schedules over HTTP: what is asked of the courier, what is refused before."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from taskkit.errors import NotWritable
from taskkit.wire.messages import ScheduleAnswer, ScheduleDefinition, ScheduleState
from tests.unit.gateway.fakes import StubEngine, client_of, token

SCHEDULES = "/api/v1/schedules"
ID = "01890a5d-ac96-774b-bcce-000000000007"


def code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["type"]).rpartition(":")[2]


def state(**given: Any) -> ScheduleState:
    definition = {
        "task": "demo.count",
        "name": "nightly",
        "cron": "0 3 * * *",
        "tz": "UTC",
        "kwargs": {"n": 3},
    }
    own = {name: given.pop(name) for name in list(given) if name in ScheduleDefinition.__struct_fields__}
    values: dict[str, Any] = {
        "id": ID,
        "subject": "me",
        "next_slot": 1_700_000_000,
        "created_at": 1.5e9,
        **given,
    }
    return ScheduleState(definition=ScheduleDefinition(**{**definition, **own}), **values)


def engine_with(status: str = "done", *states: ScheduleState, **given: Any) -> StubEngine:
    """Return an engine whose courier answers everything in that way."""
    engine = StubEngine()
    answer = ScheduleAnswer(ask="1", status=status, schedules=list(states), **given)
    engine.schedule_answers = dict.fromkeys(("list", "create", "show", "enable", "disable", "delete"), answer)
    return engine


async def test_a_schedule_is_made() -> None:
    engine = engine_with("made", state())
    body = {"task": "demo.tasks.count", "kwargs": {"n": 3}, "cron": "0 3 * * *", "tz": "Europe/Berlin"}
    options = {"priority": 5, "tags": ["a"], "metadata": {"b": 1}, "timeout": 9, "max_attempts": 2}
    async with client_of(engine) as client:
        response = await client.post(
            SCHEDULES,
            json={**body, **options, "name": "x", "overlap": "queue", "catchup": "all", "enabled": False},
        )
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"{SCHEDULES}/{ID}" == response.json()["urls"]["self"]
    [order] = engine.schedule_orders
    assert (order.order, order.enabled, order.subject) == ("create", False, "me")
    assert order.definition == ScheduleDefinition(
        task="demo.count",
        name="x",
        cron="0 3 * * *",
        tz="Europe/Berlin",
        overlap="queue",
        catchup="all",
        kwargs={"n": 3},
        options=options,
    )


async def test_the_same_again_is_200() -> None:
    async with client_of(engine_with("done", state())) as client:
        response = await client.post(SCHEDULES, json={"task": "demo.count", "kwargs": {"n": 3}, "every": 60})
    assert response.status_code == 200


async def test_a_schedule_is_shown() -> None:
    async with client_of(engine_with("done", state(last_slot=1_600_000_000, error="no zone"))) as client:
        shown = (await client.get(f"{SCHEDULES}/{ID}")).json()
    assert shown == {
        "id": ID,
        "name": "nightly",
        "task": "demo.count",
        "cron": "0 3 * * *",
        "every": None,
        "at": None,
        "tz": "UTC",
        "overlap": "skip",
        "catchup": "latest",
        "args": [],
        "kwargs": {"n": 3},
        "pool": None,
        "priority": None,
        "timeout": None,
        "max_attempts": None,
        "metadata": {},
        "tags": [],
        "enabled": True,
        "origin": "api",
        "next_at": "2023-11-14T22:13:20.000Z",
        "last_at": "2020-09-13T12:26:40.000Z",
        "created_at": "2017-07-14T02:40:00.000Z",
        "error": "no zone",
        "urls": {
            "self": f"{SCHEDULES}/{ID}",
            "enable": f"{SCHEDULES}/{ID}/enable",
            "disable": f"{SCHEDULES}/{ID}/disable",
            "runs": f"/api/v1/runs?tag=schedule:{ID}",
        },
    }


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cron": "61 * * * *"}, {"cron"}),
        ({"cron": "0 0 31 2 *"}, {"cron"}),
        ({}, {"cron"}),
        ({"cron": "* * * * *", "every": 5}, {"cron"}),
        ({"every": 0}, {"every", "cron"}),
        ({"every": 1.5}, {"every", "cron"}),
        ({"at": "tomorrow"}, {"at", "cron"}),
        ({"cron": "0 0 * * *", "tz": "Mars"}, {"tz"}),
        ({"every": 5, "tz": "UTC"}, {"tz"}),
        ({"every": 5, "overlap": "cancel"}, {"overlap"}),
        ({"every": 5, "catchup": True}, {"catchup"}),
        ({"every": 5, "name": "a b"}, {"name"}),
        ({"every": 5, "enabled": 1}, {"enabled"}),
        ({"every": 5, "run_after": "2030-01-01T00:00:00Z"}, {"run_after"}),
        ({"every": 5, "kwargs": {"n": "x"}, "priority": 101}, {"n", "priority"}),
        ({"every": 5, "tags": ["t"] * 20}, {"tags"}),
        ({"every": 5, "metadata": {"x": "y" * 15_500}}, {"metadata"}),
    ],
)
async def test_what_is_wrong_is_named_all_at_once(given: dict[str, Any], named: set[str]) -> None:
    engine = engine_with("made", state())
    async with client_of(engine) as client:
        response = await client.post(SCHEDULES, json={"task": "demo.count", "kwargs": {"n": 3}, **given})
    assert (response.status_code, code(response)) == (422, "invalid-arguments")
    assert named <= set(response.json()["errors"]) <= named | {"cron"}
    assert engine.schedule_orders == []


async def test_a_model_task_cannot_be_scheduled() -> None:
    engine = engine_with("made", state())
    async with client_of(engine) as client:
        response = await client.post(SCHEDULES, json={"task": "demo.ExampleTask", "every": 5})
    assert "makes a row" in response.json()["errors"]["task"]


async def test_what_the_courier_refuses() -> None:
    body = {"task": "demo.count", "kwargs": {"n": 3}, "every": 60}
    async with client_of(engine_with("taken", detail="another schedule is 'x'")) as client:
        response = await client.post(SCHEDULES, json=body)
        assert (response.status_code, code(response)) == (409, "schedule-conflict")
        response = await client.delete(f"{SCHEDULES}/{ID}")
        assert (response.status_code, code(response)) == (409, "schedule-conflict")
    async with client_of(engine_with("invalid", detail="at lies in the past", errors={"at": "…"})) as client:
        response = await client.post(SCHEDULES, json=body)
        assert (response.status_code, response.json()["errors"]) == (422, {"at": "…"})
    engine = StubEngine()
    engine.refusal = NotWritable("the database cannot be asked", retry_after=2)
    async with client_of(engine) as client:
        response = await client.post(SCHEDULES, json=body)
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")


async def test_the_list_has_what_the_token_reaches() -> None:
    others = state(task="demo.other", name="others", subject="them")
    engine = engine_with("done", state(), others, more=True)
    async with client_of(engine) as client:
        page = (await client.get(SCHEDULES)).json()
        assert [one["name"] for one in page["schedules"]] == ["nightly", "others"]
        await client.get(SCHEDULES, params={"cursor": page["next"], "limit": 7})
        assert (await client.get(SCHEDULES, params={"cursor": "ä"})).status_code == 400
    assert [(order.after, order.limit) for order in engine.schedule_orders] == [("", 50), ("others", 7)]
    for claims, names in (
        ({"tasks": ("demo.c*",), "runs": ()}, ["nightly"]),
        ({"tasks": (), "runs": "own"}, ["nightly"]),
        ({"tasks": (), "runs": "own", "subject": "them"}, ["others"]),
        ({"tasks": (), "runs": (ID,)}, []),
    ):
        async with client_of(engine, token(**claims)) as client:
            page = (await client.get(SCHEDULES)).json()
            assert [one["name"] for one in page["schedules"]] == names, claims


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/enable", 200), ("POST", "/disable", 200), ("DELETE", "", 204)]
)
async def test_who_may_submit_the_task_may_switch_and_remove(method: str, path: str, status: int) -> None:
    engine = engine_with("done", state())
    async with client_of(engine) as client:
        response = await client.request(method, f"{SCHEDULES}/{ID}{path}")
        assert response.status_code == status
        refused = await client.request(method, f"{SCHEDULES}/{ID}{path}", json={"grace": 1})
        assert refused.status_code == 422, "nothing of it would have an effect"
    assert [order.order for order in engine.schedule_orders] == ["show", path[1:] or "delete"]
    async with client_of(engine, token(tasks=("demo.other",))) as client:
        response = await client.request(method, f"{SCHEDULES}/{ID}{path}")
        assert (response.status_code, code(response)) == (404, "unknown-schedule")
    async with client_of(engine, token(actions=("read", "operate"))) as client:
        assert (await client.request(method, f"{SCHEDULES}/{ID}{path}")).status_code == 403


async def test_what_is_not_there_is_404() -> None:
    async with client_of(engine_with("unknown")) as client:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/enable"), ("POST", "/disable")):
            response = await client.request(method, f"{SCHEDULES}/nonsense{path}")
            assert (response.status_code, code(response)) == (404, "unknown-schedule")
