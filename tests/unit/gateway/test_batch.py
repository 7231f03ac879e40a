"""A POST that becomes many runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.batch import ROW_SECONDS
from gateway.retention import Retention
from gateway.store.protocol import StoreError
from gateway.store.rows import Batch, RunRow
from gateway.store.sqlite import SqliteStore
from gateway.submission import Submission
from taskkit.identifiers import new_run_id
from taskkit.settings import LimitSettings, Settings
from taskkit.wire.messages import Created, Row
from tests.unit.gateway.fakes import KEY, Exchange, StubEngine, app_of, client_of, token
from tests.unit.gateway.gate import Gate, gate

BATCH = "/api/v1/runs/batch"
GOOD = {"task": "demo.count", "args": [1]}
ROW = {"task": "demo.ExampleTask", "fields": {"message": "x"}}


async def post(client: httpx.AsyncClient, *items: Any, **headers: str) -> list[dict[str, Any]]:
    """Post a batch, which must be answered 200; return its outcomes, whose summary must agree with them."""
    response = await client.post(
        BATCH,
        json={"runs": items},
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )
    assert response.status_code == 200, response.text
    document = response.json()
    outcomes: list[dict[str, Any]] = document["runs"]
    assert [outcome["index"] for outcome in outcomes] == list(range(len(items)))
    runs = [outcome for outcome in outcomes if "type" not in outcome]
    assert document["replayed"] == sum(outcome["replayed"] for outcome in runs)
    assert document["accepted"] == len(runs) - document["replayed"]
    assert document["refused"] == len(items) - len(runs)
    return outcomes


def codes(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return the code of each outcome's problem, "" for a run."""
    return [outcome.get("type", "").removeprefix("urn:bulkhead:problem:") for outcome in outcomes]


async def test_each_item_has_an_outcome_of_its_own_in_order() -> None:
    engine = StubEngine(settings=Settings(limits=LimitSettings(body_bytes=5000)))
    items = [
        GOOD,
        3,
        {"task": "demo.nobody"},
        {"task": "demo.count"},
        GOOD | {"colour": "red"},
        GOOD | {"metadata": {"x": "y" * 6000}},
        GOOD | {"idempotency_key": ""},
        GOOD | {"tags": ["last"]},
    ]
    async with client_of(engine) as client:
        outcomes = await post(client, *items)
    assert codes(outcomes) == [
        *("", "bad-json", "unknown-task", "invalid-arguments", "invalid-arguments", "too-large"),
        *("invalid-arguments", ""),
    ]
    assert list(outcomes[3]["errors"]) == ["n"]
    assert list(outcomes[4]["errors"]) == ["colour"]
    assert list(outcomes[6]["errors"]) == ["idempotency_key"]
    assert outcomes[2]["status"] == 404
    assert outcomes[2]["instance"] == f"{BATCH}#/runs/2"
    assert [submission.tags for submission in engine.submissions] == [(), ("last",)]


async def test_an_outcome_is_what_a_single_submission_answers() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        (outcome,) = await post(client, GOOD)
        single = (await client.post("/api/v1/runs", json=GOOD)).json()
    assert set(outcome) == {*single, "index", "replayed"}
    async with client_of(engine, outcome["token"]) as client:
        assert (await client.get(outcome["urls"]["self"])).status_code == 200
        assert (await client.get(single["urls"]["self"])).status_code == 404


async def test_an_item_beyond_the_token_is_403_and_the_others_go_on() -> None:
    async with client_of(StubEngine(), token(tasks=("demo.count",))) as client:
        assert codes(await post(client, ROW, GOOD)) == ["forbidden", ""]
    async with client_of(StubEngine(), token(actions=["read"])) as client:
        assert (await client.post(BATCH, json={"runs": [GOOD]})).status_code == 403


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"[]", 422, "runs"),
        (b"{}", 422, "runs"),
        (b'{"runs": 3}', 422, "runs"),
        (b'{"runs": []}', 422, "1 to 3 items"),
        (b'{"runs": [1, 2, 3, 4]}', 422, "1 to 3 items (LIMITS.batch_runs), not 4"),
        (b'{"runs": [1], "atomic": true}', 422, "atomic"),
        (b'{"runs": [', 400, "no JSON"),
        (b'{"runs": ["' + b"x" * 9000 + b'"]}', 413, "LIMITS.batch_bytes = 8000"),
    ],
)
async def test_what_is_no_batch_is_refused_whole(body: bytes, status: int, named: str) -> None:
    settings = Settings(limits=LimitSettings(batch_runs=3, batch_bytes=8000))
    async with client_of(StubEngine(settings=settings)) as client:
        response = await client.post(BATCH, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status, response.text
        assert named in response.json()["detail"]
        assert (await client.post(f"{BATCH}?atomic=1", json={"runs": [GOOD]})).status_code == 400


async def test_keys_of_items_are_those_of_single_submissions() -> None:
    async with client_of(StubEngine()) as client:
        single = await client.post("/api/v1/runs", json=GOOD, headers={"Idempotency-Key": "k"})
        mine = GOOD | {"idempotency_key": "k"}
        outcomes = await post(client, mine, mine | {"args": [2]}, GOOD)
        assert codes(outcomes) == ["", "idempotency-conflict", ""]
        assert outcomes[0]["id"] == single.json()["id"]
        assert [outcomes[0]["replayed"], outcomes[2]["replayed"]] == [True, False]


async def test_one_key_for_the_whole_makes_each_item_repeatable() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        batch = [GOOD, {"task": "demo.nobody"}, GOOD | {"idempotency_key": "own"}]
        first = await post(client, *batch, idempotency_key="all")
        again = await post(client, *batch, idempotency_key="all")
        other = await post(client, GOOD | {"args": [2]}, GOOD, batch[2], idempotency_key="all")
    assert [outcome.get("id") for outcome in again] == [outcome.get("id") for outcome in first]
    assert again[0]["replayed"]
    assert codes(other) == ["idempotency-conflict", "", ""], "what had no outcome then has one now"
    assert other[2]["id"] == first[2]["id"]
    assert len(engine.submissions) == 3


async def test_an_id_of_somebody_elses_run_is_refused() -> None:
    engine = StubEngine()
    async with client_of(engine, token(subject="ann")) as client:
        (hers,) = await post(client, GOOD)
    async with client_of(engine, token(subject="bob")) as client:
        outcomes = await post(client, GOOD | {"id": hers["id"]}, GOOD)
    assert codes(outcomes) == ["idempotency-conflict", ""]


# --- rows of model tasks


class Intake:
    """Saves rows when it is let; notes how many are under way at once."""

    def __init__(self, engine: StubEngine, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.begun = 0
        self.busy = 0
        self.most = 0
        self.let = trio.Event()
        engine.create_row = self.create_row  # type: ignore[method-assign]

    async def create_row(self, submission: Submission, fields: dict[str, Any]) -> Created:
        self.begun += 1
        self.busy += 1
        self.most = max(self.most, self.busy)
        await trio.sleep(self._seconds)
        await self.let.wait()
        self.busy -= 1
        return Created(ask="1", row=Row(app="demo", model="ExampleTask", pk=self.begun), run=submission.id)


async def test_rows_are_made_as_many_at_a_time_as_there_are_intake_runners() -> None:
    engine = StubEngine(settings=Settings(intake_runners=2))
    intake = Intake(engine)
    intake.let.set()
    async with client_of(engine) as client:
        outcomes = await post(client, ROW, GOOD, *[ROW] * 6)
    assert codes(outcomes) == [""] * 8
    assert (intake.begun, intake.most) == (7, 2)
    assert engine.submissions[0].task.name == "demo.count", "what needs no row does not wait for rows"


async def test_rows_that_were_not_begun_in_time_are_503_with_an_id(autojump_clock: Any) -> None:
    engine = StubEngine()
    intake = Intake(engine, seconds=ROW_SECONDS * 0.6)
    intake.let.set()
    async with client_of(engine) as client:
        outcomes = await post(client, *[ROW] * 4)
        assert codes(outcomes) == ["", "", "not-writable", "not-writable"]
        assert (outcomes[2]["status"], outcomes[2]["retry_after"]) == (503, 1.0)
        (again,) = await post(client, ROW | {"id": outcomes[2]["run"]})
    assert again["id"] == outcomes[2]["run"]


class Posted(Exchange):
    """A request with a body, under way."""

    def __init__(self, body: Any) -> None:
        data = msgspec.json.encode(body)
        super().__init__(BATCH, "POST", content_length=str(len(data)), content_type="application/json")
        self._data = data

    async def receive(self) -> dict[str, Any]:
        message = await super().receive()
        return message | {"body": self._data} if message["type"] == "http.request" else message


async def test_a_client_that_leaves_has_its_plain_runs_and_no_further_rows() -> None:
    engine = StubEngine()
    intake = Intake(engine)
    one = Posted({"runs": [ROW, ROW, GOOD | {"idempotency_key": "k"}]})
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, app_of(engine))
            while not intake.busy:
                await trio.lowlevel.checkpoint()
            one.leave()
            await trio.testing.wait_all_tasks_blocked()
            intake.let.set()
    assert intake.begun == 1, "the row under way is made, the next one is not begun"
    assert len(engine.submissions) == 2
    async with client_of(engine) as client:
        (found,) = await post(client, GOOD | {"idempotency_key": "k"})
    assert found["replayed"]


# --- the real engine


class Watched:
    """A store that counts commits, and fails them while `broken`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.broken = False
        self.commits: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, batch: Batch) -> None:
        if self.broken:
            await trio.lowlevel.checkpoint()
            raise StoreError("no space left on device")
        if batch.runs:
            self.commits.append(len(batch.runs))
        await self._store.commit(batch)


@asynccontextmanager
async def served(directory: Path, **limits: Any) -> AsyncIterator[tuple[Gate, httpx.AsyncClient]]:
    """Give a real engine over a real store, with a client of its API."""
    settings = Settings(limits=LimitSettings(**limits))
    async with gate(directory, settings=settings, wrap=Watched) as g:
        authenticator = Authenticator(KEY, ["testserver"], desk=g.engine)
        app = build_app(g.engine, authenticator, Retention(g.store, g.engine.settings, "boot"))
        headers = {"Authorization": f"Bearer {token()}"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://testserver", headers=headers
        ) as client:
            yield g, client


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"task": "t.f", "kwargs": {"n": n}, **more} for n in range(count)]


async def test_a_thousand_items_are_one_commit(tmp_path: Path) -> None:
    async with served(tmp_path) as (g, client):
        outcomes = await post(client, *numbered(1000))
        assert g.engine.store.commits == [1000]  # type: ignore[attr-defined]
        rows = await g.store.runs_by_id([outcome["id"] for outcome in outcomes])
        assert [rows[outcome["id"]].kwargs for outcome in outcomes] == [b'{"n":%d}' % n for n in range(1000)]
        numbers = [row.no for row in rows.values()]
        assert sorted(numbers) == list(range(1, 1001))


async def test_a_key_twice_in_one_batch_is_one_run(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, client):
        one = {"task": "t.f", "kwargs": {"n": 1}, "idempotency_key": "k"}
        outcomes = await post(client, one, one, one | {"kwargs": {"n": 2}})
        assert codes(outcomes) == ["", "", "idempotency-conflict"]
        assert outcomes[0]["id"] == outcomes[1]["id"]
        assert [outcome["replayed"] for outcome in outcomes[:2]] == [False, True]


async def test_a_queue_that_is_full_midway_refuses_the_rest(tmp_path: Path) -> None:
    async with served(tmp_path, queued_runs=3) as (_, client):
        outcomes = await post(client, *numbered(5))
        assert codes(outcomes) == ["", "", "", "queue-full", "queue-full"]
        assert [(one["status"], one["retry_after"]) for one in outcomes[3:]] == [(429, 5)] * 2


async def test_a_store_that_is_not_written_gives_every_item_the_id_to_come_back_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.engine._ANSWER_SECONDS", 0.1)
    async with served(tmp_path) as (g, client):
        store: Any = g.engine.store
        store.broken = True
        outcomes = await post(client, *numbered(2), {"task": "t.nobody"})
        assert codes(outcomes) == ["not-writable", "not-writable", "unknown-task"]
        assert all(outcome["retry_after"] for outcome in outcomes[:2])
        store.broken = False
        monkeypatch.undo()
        await g.until(lambda: not g.engine.store_error)
        retries = [
            one | {"id": outcome["run"]} for one, outcome in zip(numbered(2), outcomes[:2], strict=True)
        ]
        again = await post(client, *retries)
        assert [one["id"] for one in again] == [one["run"] for one in outcomes[:2]]
        runs: dict[str, RunRow] = await g.store.runs_by_id([one["id"] for one in again])
        assert len(runs) == 2
        assert await g.store.run(new_run_id()) is None
