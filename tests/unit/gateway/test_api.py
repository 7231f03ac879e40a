"""The routes under /api/v1."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from gateway.reading import negotiate, page_cursor, parse_page_cursor, preferred_wait
from gateway.store.rows import AttemptRow, RunRow
from gateway.submission import Submission
from taskkit import tokens
from taskkit.errors import InvalidArguments, NotWritable, QueueFull
from taskkit.identifiers import new_run_id, parse_run_id
from taskkit.lifecycle import RunStatus
from taskkit.settings import LimitSettings, Settings
from taskkit.wire.messages import Created, Located
from tests.unit.gateway.fakes import KEY, Exchange, StubEngine, View, app_of, client_of, exchange, token

RUNS = "/api/v1/runs"


def code(response: httpx.Response) -> str:
    """Return a problem's code, and see that it is a whole problem."""
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == response.status_code
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == response.request.url.path
    return str(document["type"]).removeprefix("urn:bulkhead:problem:")


async def test_a_submission_becomes_a_run() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        response = await client.post(RUNS, json={"task": "demo.count", "kwargs": {"n": 3}, "tags": ["x"]})
        document = response.json()
        id = document["id"]
        assert response.status_code == 202
        assert response.headers["location"] == f"{RUNS}/{id}"
        assert parse_run_id(id) == id
        assert document["status"] == "READY"
        assert document["task"] == "demo.count"
        assert document["urls"] == {
            "self": f"{RUNS}/{id}",
            "events": f"{RUNS}/{id}/events",
            "result": f"{RUNS}/{id}/result",
            "cancel": f"{RUNS}/{id}/cancel",
        }
        claims = tokens.verify(KEY, document["token"])
        assert claims.runs == frozenset({id})
        assert claims.actions == {"read", "cancel", "logs"}
        assert claims.tasks == ()
    submission = engine.submissions[0]
    assert (submission.kwargs, submission.subject, submission.tags) == (b'{"n":3}', "me", ("x",))


async def test_the_token_of_a_submission_reads_that_run_only() -> None:
    engine = StubEngine()
    other = engine.start()
    async with client_of(engine) as client:
        one = (await client.post(RUNS, json={"task": "demo.count", "args": [1]})).json()
    async with client_of(engine, one["token"]) as client:
        assert (await client.get(one["urls"]["self"])).status_code == 200
        foreign = await client.get(f"{RUNS}/{other.id}")
        assert code(foreign) == "unknown-run"
        assert foreign.status_code == 404
        assert code(await client.post(RUNS, json={"task": "demo.count", "args": [1]})) == "forbidden"
        listed = (await client.get(RUNS)).json()["runs"]
        assert [run["id"] for run in listed] == [one["id"]]
        assert (await client.post(one["urls"]["cancel"])).status_code == 202
        assert code(await client.get("/api/v1/runners")) == "forbidden"
        assert code(await client.get("/api/v1/stats")) == "forbidden"


async def test_an_idempotency_key_makes_one_run_of_two_posts() -> None:
    engine = StubEngine()
    headers = {"Idempotency-Key": "k1"}
    async with client_of(engine) as client:
        one = await client.post(RUNS, json={"task": "demo.count", "args": [1]}, headers=headers)
        two = await client.post(RUNS, json={"args": [1], "task": "demo.count"}, headers=headers)
        other = await client.post(RUNS, json={"task": "demo.count", "args": [2]}, headers=headers)
        assert (one.status_code, two.status_code, other.status_code) == (202, 200, 409)
        assert two.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in one.headers
        assert one.json()["id"] == two.json()["id"]
        assert code(other) == "idempotency-conflict"
        for key in ("", "x" * 201):
            bad = await client.post(RUNS, json={}, headers={"Idempotency-Key": key})
            assert code(bad) == "bad-request"


async def test_the_id_of_a_503_makes_a_retry_safe() -> None:
    engine = StubEngine(refusal=NotWritable("the disk is full"))
    body: dict[str, Any] = {"task": "demo.count", "args": [1]}
    async with client_of(engine) as client:
        refused = await client.post(RUNS, json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert code(refused) == "not-writable"
        id = refused.json()["run"]
        engine.refusal = None
        assert (await client.post(RUNS, json={**body, "id": id})).json()["id"] == id
        again = await client.post(RUNS, json={**body, "id": id})
        assert (again.status_code, again.json()["id"]) == (200, id)
    assert len(engine.store.rows) == 1


async def test_an_id_gives_no_token_for_somebody_elses_run() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        one = (await client.post(RUNS, json={"task": "demo.count", "args": [1]})).json()
        changed = await client.post(RUNS, json={"task": "demo.count", "args": [2], "id": one["id"]})
        assert code(changed) == "idempotency-conflict"
    async with client_of(engine, token(subject="mallory", runs=())) as client:
        stolen = await client.post(RUNS, json={"task": "demo.count", "args": [1], "id": one["id"]})
        assert stolen.status_code == 409
        assert "token" not in stolen.json()


async def test_a_full_queue_is_429() -> None:
    engine = StubEngine(refusal=QueueFull("10000 runs wait", retry_after=2.5))
    async with client_of(engine) as client:
        response = await client.post(RUNS, json={"task": "demo.count", "args": [1]})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert code(response) == "queue-full"


async def test_a_broken_store_is_503_with_the_id() -> None:
    engine = StubEngine()

    async def submit(submission: Submission) -> Any:
        await engine.store.counts()

    engine.store.broken = True
    engine.submit = submit  # type: ignore[method-assign]
    async with client_of(engine) as client:
        response = await client.post(RUNS, json={"task": "demo.count", "args": [1]})
        assert (response.status_code, code(response)) == (503, "not-writable")
        assert parse_run_id(response.json()["run"])
        listed = await client.get(RUNS)
        assert (listed.status_code, code(listed)) == (503, "not-writable")
        assert int(listed.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("body", "status", "name", "field"),
    [
        ({"task": "demo.nobody"}, 404, "unknown-task", None),
        ({"task": "demo.count"}, 422, "invalid-arguments", "n"),
        ({"task": "demo.count", "kwargs": {"n": "x"}}, 422, "invalid-arguments", "n"),
        ({"task": "demo.count", "args": [1], "colour": 1}, 422, "invalid-arguments", "colour"),
        ({"kwargs": {"n": 1}}, 422, "invalid-arguments", "task"),
    ],
)
async def test_what_is_wrong_is_named(
    body: dict[str, Any], status: int, name: str, field: str | None
) -> None:
    async with client_of(StubEngine()) as client:
        response = await client.post(RUNS, json=body)
    assert (response.status_code, code(response)) == (status, name)
    if field is not None:
        assert list(response.json()["errors"]) == [field]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"NaN", b'{"a":"\\ud800"}', b"\xff", b"[" * 100_000, b'{"a":1e400}']
)
async def test_bad_json_is_400(content: bytes) -> None:
    async with client_of(StubEngine()) as client:
        response = await client.post(RUNS, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, code(response)) == (400, "bad-json")


async def test_another_content_type_is_415() -> None:
    async with client_of(StubEngine()) as client:
        response = await client.post(RUNS, data={"task": "demo.count"})
        assert (response.status_code, code(response)) == (415, "unsupported-media-type")
        body = b'{"task":"demo.count","args":[1]}'
        for kind in ("application/json; charset=utf-8", "application/vnd.x+json"):
            fine = await client.post(RUNS, content=body, headers={"Content-Type": kind})
            assert fine.status_code == 202
        assert (await client.post(RUNS, content=body)).status_code == 202


async def test_a_large_body_is_413_announced_or_not() -> None:
    engine = StubEngine(settings=Settings(limits=LimitSettings(body_bytes=1000)))

    class Endless(Exchange):
        read = 0

        async def receive(self) -> dict[str, Any]:
            await trio.lowlevel.checkpoint()
            self.read += 100
            assert self.read < 5000, "nobody stops reading"
            return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async with client_of(engine) as client:
        announced = await client.post(RUNS, content=b"x" * 1001)
        assert (announced.status_code, code(announced)) == (413, "too-large")
    one = Endless(RUNS, "POST")
    await one.run(app_of(engine))
    assert (one.status, one.read) == (413, 1100)


async def test_a_large_body_is_checked_beside_the_loop() -> None:
    engine = StubEngine()
    body = {"task": "demo.count", "kwargs": {"n": 1, "items": list(range(20_000))}}
    async with client_of(engine) as client:
        assert (await client.post(RUNS, json=body)).status_code == 202
        body["kwargs"]["items"][-1] = "x"  # type: ignore[index]
        response = await client.post(RUNS, json=body)
        assert list(response.json()["errors"]) == ["items[19999]"]


async def test_a_body_that_trickles_is_408(autojump_clock: trio.testing.MockClock) -> None:
    class Trickle(Exchange):
        async def receive(self) -> dict[str, Any]:
            await trio.sleep(10)
            return {"type": "http.request", "body": b" ", "more_body": True}

    one = Trickle(RUNS, "POST")
    with trio.fail_after(LimitSettings().body_seconds + 1):
        await one.run(app_of(StubEngine()))
    assert one.status == 408


async def test_a_client_that_leaves_in_its_body_is_no_incident() -> None:
    one = Exchange(RUNS, "POST", content_length="10")
    one._asked = True
    one.leave()
    await one.run(app_of(StubEngine()))
    assert one.status == 400


async def test_a_task_beyond_the_token_is_403_known_or_not() -> None:
    engine = StubEngine()
    async with client_of(engine, token(tasks=("other.*",))) as client:
        for name in ("demo.count", "demo.tasks.count", "demo.nobody"):
            response = await client.post(RUNS, json={"task": name, "args": [1]})
            assert (response.status_code, code(response)) == (403, "forbidden")
        unknown = await client.post(RUNS, json={"task": "other.nobody"})
        assert code(unknown) == "unknown-task"
    async with client_of(engine, token(tasks=("demo.count",))) as client:
        response = await client.post(RUNS, json={"task": "demo.tasks.count", "args": [1]})
        assert response.status_code == 202


# --- model tasks ----------------------------------------------------------------------------------------------


async def test_a_model_task_is_saved_then_submitted() -> None:
    engine = StubEngine()
    async with client_of(engine) as client:
        response = await client.post(RUNS, json={"task": "demo.ExampleTask", "fields": {"message": "hi"}})
    assert response.status_code == 202
    assert engine.created == [{"message": "hi"}]
    row = engine.submissions[0].row
    assert row is not None
    assert row.key == "demo.exampletask:1"


async def test_a_repeated_model_submission_saves_one_row() -> None:
    engine = StubEngine()
    body = {"task": "demo.ExampleTask", "fields": {"message": "hi"}}
    async with client_of(engine) as client:
        one = await client.post(RUNS, json=body, headers={"Idempotency-Key": "k"})
        two = await client.post(RUNS, json=body, headers={"Idempotency-Key": "k"})
        assert (one.status_code, two.status_code) == (202, 200)
        id = one.json()["id"]
        three = await client.post(RUNS, json={**body, "id": id})
        assert (three.status_code, three.json()["id"]) == (200, id)
    assert len(engine.created) == 1


async def test_the_same_model_submission_twice_at_once_saves_one_row() -> None:
    engine = StubEngine()
    body = {"task": "demo.ExampleTask", "fields": {"message": "hi"}}
    codes: list[int] = []
    async with client_of(engine) as client:

        async def post() -> None:
            codes.append((await client.post(RUNS, json=body, headers={"Idempotency-Key": "k"})).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            nursery.start_soon(post)
    assert sorted(codes) == [202, 503]
    assert len(engine.created) == 1


async def test_a_saved_row_waits_for_room_and_its_client_gets_the_id() -> None:
    class FullEngine(StubEngine):
        async def submit(self, submission: Submission) -> tuple[RunRow, bool]:
            raise QueueFull("10 runs wait already", retry_after=5)

    async with client_of(FullEngine()) as client:
        response = await client.post(
            RUNS,
            json={"task": "demo.ExampleTask", "fields": {"message": "hi"}},
            headers={"Idempotency-Key": "k"},
        )
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert parse_run_id(response.json()["run"]), "the row is saved, so its run will be made: that is no 429"


async def test_a_repetition_goes_on_with_the_first_ones_row_and_id() -> None:
    first = new_run_id()

    class KnowingEngine(StubEngine):
        async def create_row(self, submission: Submission, fields: dict[str, Any]) -> Created:
            made = await super().create_row(submission, fields)
            return Created(ask="1", row=made.row, run=first)

    engine = KnowingEngine()
    async with client_of(engine) as client:
        response = await client.post(RUNS, json={"task": "demo.ExampleTask", "fields": {"message": "hi"}})
    assert (response.status_code, response.json()["id"]) == (202, first)
    assert engine.submissions[0].id == first


async def test_what_the_model_refuses_is_422_an_absent_database_503() -> None:
    engine = StubEngine(refusal=InvalidArguments("not valid", errors={"message": "Too long."}))
    body = {"task": "demo.ExampleTask", "fields": {"message": "hi"}}
    async with client_of(engine) as client:
        response = await client.post(RUNS, json=body)
        assert (response.status_code, response.json()["errors"]) == (422, {"message": "Too long."})
        engine.refusal = NotWritable("the database is away")
        response = await client.post(RUNS, json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert parse_run_id(response.json()["run"])


# --- reading --------------------------------------------------------------------------------------------------


async def test_a_snapshot_tells_everything() -> None:
    engine = StubEngine()
    run = engine.start(progress=b'{"done":1}', metadata=b'{"a":1}', tags=("x",), attempt=2)
    engine.emit(run, ("a", 1))
    engine.say(run, "Traceback", stream="stderr")
    engine.say(run, "out")
    common: dict[str, Any] = {"run": run.no, "runner": "r1", "pid": 9, "assigned_at": 1.0}
    engine.store.attempt_rows = [
        AttemptRow(number=1, token="t", ending="crashed", cause=b'{"kind":"signal"}', **common),
        AttemptRow(number=2, token="u", **common),
    ]
    engine.end(run, RunStatus.FAILED)
    async with client_of(engine) as client:
        document = (await client.get(f"{RUNS}/{run.id}")).json()
        assert document["status"] == "FAILED"
        assert document["error"] == {"code": "raised", "message": "boom"}
        assert document["result"] is None
        assert document["progress"] == {"done": 1}
        assert document["metadata"] == {"a": 1}
        assert document["tags"] == ["x"]
        assert document["offsets"] == {"first": 1, "last": 2, "cursor": "2"}
        assert document["result_expired"] is False
        assert document["subscribers"] == 0
        assert document["finished_at"] == "2023-11-14T22:15:00.000Z"
        first, second = document["attempts"]
        assert (first["ending"], first["cause"], first["stderr"]) == (
            "crashed",
            {"kind": "signal"},
            ["Traceback"],
        )
        assert second["ending"] is None
        assert "stderr" not in second
        assert "token" not in first, "the fence of an attempt is nobody's business"
    async with client_of(engine, token(actions={"read"})) as client:
        document = (await client.get(f"{RUNS}/{run.id}")).json()
        assert "stderr" not in document["attempts"][0]


async def test_subscribers_are_counted() -> None:
    engine = StubEngine()
    run = engine.start()
    async with exchange(engine, f"{RUNS}/{run.id}/events") as one, client_of(engine) as client:
        await one.until(b"retry")
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.get(f"{RUNS}/{run.id}")).json()["subscribers"] == 1
        assert (await client.get("/api/v1/stats")).json()["subscribers"] == 1


@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("GET", ""),
        ("HEAD", ""),
        ("GET", "/result"),
        ("GET", "/events?after=3&types=a%2Cb"),
        *(("POST", rest) for rest in ("/cancel", "/replay", "/input/approval")),
    ],
)
async def test_a_run_of_another_node_is_answered_there(method: str, rest: str) -> None:
    engine = StubEngine()
    run, hidden = new_run_id(), new_run_id()
    engine.located = {
        run: Located(ask="1", status="found", url="https://node2.example/base/", task="demo.count"),
        hidden: Located(ask="1", status="found", url="https://node2.example", task="other.task"),
    }
    everything = sorted(tokens.ACTIONS)
    async with client_of(engine, token(runs=(), tasks=("demo.*",), actions=everything)) as client:
        response = await client.request(method, f"{RUNS}/{run}{rest}")
        assert response.status_code == 307
        assert response.headers["location"] == f"https://node2.example/base{RUNS}/{run}{rest}"
        assert response.headers["cache-control"] == "no-store"
        assert (await client.request(method, f"{RUNS}/{hidden}{rest}")).status_code == 404


@pytest.mark.parametrize("rest", ["", "/result", "/events"])
async def test_unknown_runs_are_404(rest: str) -> None:
    engine = StubEngine()
    foreign = engine.start("other.task")
    async with client_of(engine, token(runs=(), tasks=("demo.*",))) as client:
        for id in ("x", new_run_id(), foreign.id):
            response = await client.get(f"{RUNS}/{id}{rest}")
            assert (response.status_code, code(response)) == (404, "unknown-run")
        assert code(await client.post(f"{RUNS}/{foreign.id}/cancel")) == "unknown-run"


async def test_a_list_is_filtered_and_paged() -> None:
    engine = StubEngine()
    runs = [
        engine.start("demo.count" if n % 2 else "demo.ExampleTask", tags=(f"t{n % 3}",)) for n in range(10)
    ]
    engine.end(runs[0])
    async with client_of(engine) as client:

        async def numbers(query: str) -> list[int]:
            document = (await client.get(f"{RUNS}?{query}")).json()
            return [[run.id for run in runs].index(one["id"]) for one in document["runs"]]

        assert await numbers("") == list(range(9, -1, -1))
        assert await numbers("status=SUCCESSFUL") == [0]
        assert await numbers("task=demo.tasks.count") == [9, 7, 5, 3, 1]
        assert await numbers("task=gone.task") == []
        assert await numbers("tag=t0") == [9, 6, 3, 0]
        assert await numbers("since=2023-11-14T22:13:28Z") == [9, 8, 7]
        assert await numbers("until=2023-11-14T22:13:23Z") == [1, 0]
        found: list[str] = []
        cursor = ""
        for _ in range(5):
            document = (await client.get(f"{RUNS}?limit=3{cursor}")).json()
            found += [one["id"] for one in document["runs"]]
            if document["next"] is None:
                break
            cursor = f"&cursor={document['next']}"
        assert found == [run.id for run in reversed(runs)]


@pytest.mark.parametrize(
    "query",
    [
        "status=READYISH", "limit=0", "limit=201", "limit=x", "limit=", "limit=1&limit=2", "since=yesterday",
        "until=2023-01-01", "cursor=abc", "cursor=%00", "order=asc",
    ],
)  # fmt: skip
async def test_a_bad_parameter_is_400_and_named(query: str) -> None:
    async with client_of(StubEngine()) as client:
        response = await client.get(f"{RUNS}?{query}")
    assert (response.status_code, code(response)) == (400, "bad-parameter")
    assert response.json()["parameter"] == query.partition("=")[0]


async def test_a_token_without_reach_lists_nothing() -> None:
    engine = StubEngine()
    engine.start()
    async with client_of(engine, token(runs=(), tasks=())) as client:
        assert (await client.get(RUNS)).json() == {"runs": [], "next": None}


async def test_a_result_is_202_until_there_is_one() -> None:
    engine = StubEngine()
    run = engine.start()
    path = f"{RUNS}/{run.id}/result"
    async with client_of(engine) as client:
        response = await client.get(path)
        assert (response.status_code, response.json()) == (202, {"id": run.id, "status": "RUNNING"})
        engine.end(run, result={"a": [1]})
        response = await client.get(path)
        assert response.status_code == 200
        assert response.json()["result"] == {"a": [1]}


async def test_a_failed_run_has_an_error_for_a_result() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.end(run, RunStatus.FAILED)
    async with client_of(engine) as client:
        response = await client.get(f"{RUNS}/{run.id}/result")
    assert response.json()["error"]["message"] == "boom"
    assert "result" not in response.json()


async def test_a_result_can_be_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    engine = StubEngine()
    run = engine.start()
    path = f"{RUNS}/{run.id}/result"

    async def work() -> None:
        for n in range(4):
            await trio.sleep(1)
            engine.emit(run, ("a", n))
        engine.end(run, result=1)

    async with client_of(engine) as client:
        start = trio.current_time()
        response = await client.get(path, headers={"Prefer": "respond-async, wait=3"})
        assert response.status_code == 202
        assert response.headers["preference-applied"] == "wait=3"
        assert trio.current_time() - start == pytest.approx(3, abs=0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            response = await client.get(path, headers={"Prefer": "wait=30"})
        assert response.json()["result"] == 1
        assert trio.current_time() - start == pytest.approx(7, abs=0.1)


async def test_a_large_result_is_read_from_its_blob() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.end(run)
    engine.store.rows[run.no].result = None
    engine.store.rows[run.no].result_blob = name = new_run_id()
    engine.store.blobs[name] = b'["' + b"x" * 100_000 + b'"]'
    async with client_of(engine) as client:
        for rest in ("/result", ""):
            assert (await client.get(f"{RUNS}/{run.id}{rest}")).json()["result"] == ["x" * 100_000]


async def test_cancel() -> None:
    engine = StubEngine()
    run = engine.start()
    path = f"{RUNS}/{run.id}/cancel"
    async with client_of(engine) as client:
        response = await client.post(path)
        assert (response.status_code, response.json()["cancelling"]) == (202, True)
        assert (await client.post(path, json={"grace": 2})).status_code == 202
        assert engine.graces == [None, 2.0]
        for body in ({"grace": -1}, {"grace": "x"}, {"grace": True}, {"force": True}):
            response = await client.post(path, json=body)
            assert (response.status_code, list(response.json()["errors"])) == (422, list(body))
        engine.end(run, RunStatus.CANCELLED)
        late = await client.post(path)
        assert (late.status_code, code(late)) == (409, "run-finished")
    async with client_of(engine, token(actions={"read"})) as client:
        assert (await client.post(path)).status_code == 403


async def test_runners_show_what_the_kernel_says() -> None:
    engine = StubEngine(
        views=[
            View(id="r1", pid=os.getpid(), state="BUSY", runs=("x",), runs_done=3),
            View(id="r2", pid=2**22 + 1),
            View(id="r3", pid=os.getpid(), state="EXITED", last_ending="crashed"),
        ]
    )
    async with client_of(engine, token(actions={"operate"}, runs=())) as client:
        one, two, three = (await client.get("/api/v1/runners")).json()["runners"]
    assert one["rss"] > 1_000_000
    assert one["cpu"] > 0
    assert (one["runs"], one["runs_done"], one["started_at"]) == (["x"], 3, "1970-01-01T00:00:00.000Z")
    assert (two["rss"], two["cpu"], three["rss"]) == (None, None, None)


async def test_the_catalogue_shows_what_the_token_reaches() -> None:
    engine = StubEngine()
    async with client_of(engine, token(runs=(), tasks=("demo.c*",))) as client:
        tasks = (await client.get("/api/v1/tasks")).json()["tasks"]
        assert [task["name"] for task in tasks] == ["demo.count"]
        assert tasks[0]["parameters"]["required"] == ["n"]
        assert (await client.get("/api/v1/tasks/demo.count")).json() == tasks[0]
        assert code(await client.get("/api/v1/tasks/demo.ExampleTask")) == "unknown-task"
        assert code(await client.get("/api/v1/tasks/demo.nobody")) == "unknown-task"


async def test_statistics() -> None:
    engine = StubEngine()
    engine.start()
    async with client_of(engine) as client:
        document = (await client.get("/api/v1/stats")).json()
    assert (document["runs"], document["queued"], document["subscribers"]) == ({"RUNNING": 1}, 0, 0)


async def test_health_asks_nobody() -> None:
    engine = StubEngine()
    engine.store.broken = True
    async with client_of(engine, "") as client:
        response = await client.get("/health")
        assert (response.status_code, response.text) == (200, "OK")
        assert response.headers["content-type"].startswith("text/plain")
        assert (await client.head("/health")).status_code == 200
    assert engine.store.reads == 0


async def test_ready_names_what_is_away() -> None:
    engine = StubEngine(views=[View(id="r1", pid=1)])
    async with client_of(engine, "") as client:
        response = await client.get("/ready")
        assert response.status_code == 200
        assert response.json() == {"ready": True, "parts": {"store": True, "courier": True, "runners": True}}
        engine.store.broken, engine.courier = True, False
        response = await client.get("/ready")
        parts = {"store": False, "courier": False, "runners": True}
        assert (response.status_code, response.json()) == (503, {"ready": False, "parts": parts})


# --- every route ----------------------------------------------------------------------------------------------

PATHS = [
    RUNS, f"{RUNS}/x", f"{RUNS}/x/result", f"{RUNS}/x/events", f"{RUNS}/x/cancel", "/api/v1/runners",
    "/api/v1/tasks", "/api/v1/tasks/demo.count", "/api/v1/stats", "/stream/demo/ExampleTask/1",
    "/stream/ExampleTask/1", "/health", "/ready", "/", "/nowhere", f"{RUNS}/", "/api/v1/runs/x/nothing",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
@pytest.mark.parametrize("bearer", ["", "x.y.z", None])
async def test_every_error_is_a_problem(path: str, method: str, bearer: str | None) -> None:
    async with client_of(StubEngine(), bearer) as client:
        response = await client.request(method, path)
    if response.status_code == 405:
        assert "OPTIONS" in response.headers["allow"]
    if response.status_code == 401:
        assert response.headers["www-authenticate"].startswith("Bearer")
    if response.status_code >= 400 and path != "/ready":
        assert response.headers["content-type"] == "application/problem+json"
        assert method == "HEAD" or code(response)
    if method == "OPTIONS" and response.status_code != 404:
        assert response.status_code == 204
        assert response.headers["allow"]
    public = path in ("/health", "/ready") or method == "OPTIONS"
    if bearer is not None and not public:
        assert response.status_code in (401, 404, 405)


async def test_a_strange_host_is_refused() -> None:
    async with client_of(StubEngine()) as client:
        response = await client.get("/health", headers={"Host": "evil.example"})
        assert response.status_code == 421
        assert response.headers["content-type"] == "application/problem+json"


async def test_what_nobody_foresaw_is_500_without_details() -> None:
    engine = StubEngine()

    async def counts() -> dict[str, int]:
        raise RuntimeError("secret")

    engine.store.counts = counts  # type: ignore[method-assign]
    async with client_of(engine) as client:
        response = await client.get("/api/v1/stats")
    assert (response.status_code, code(response)) == (500, "internal")
    assert "secret" not in response.text
    assert response.json()["incident"]


async def test_cors_is_by_list_and_does_not_hold_streams_back() -> None:
    engine = StubEngine(settings=Settings(cors_origins=["https://a.example"]))
    run = engine.start()
    engine.emit(run, ("a", 1))
    path = f"{RUNS}/{run.id}/events"
    async with exchange(engine, path, origin="https://a.example") as one:
        await one.until(b"id: 1\n")
        assert one.headers["access-control-allow-origin"] == "https://a.example"
        assert not one.ended
    async with client_of(engine) as client:
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert (await client.options(RUNS, headers=preflight)).status_code == 200
        stranger = await client.get(RUNS, headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in stranger.headers
        refused = await client.get(f"{RUNS}/x", headers={"Origin": "https://a.example"})
        assert refused.status_code == 404
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


# --- small readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("", None),
        ("wait=5", 5.0),
        ("respond-async, wait = 7; x=1", 7.0),
        ("wait=9999", 60.0),
        ("wait=x", None),
    ],
)
def test_prefer_wait(header: str, wait: float | None) -> None:
    assert preferred_wait(header) == wait


def test_page_cursors_are_opaque_and_checked() -> None:
    assert parse_page_cursor(page_cursor(12)) == 12
    for text in ("", "r12", "ü", "====", "A" * 50):
        assert parse_page_cursor(text) is None


def test_the_best_offer_wins() -> None:
    offers = ("a/x", "a/y", "b/z")
    assert negotiate("a/y;q=0.9, */*;q=0.1", offers) == "a/y"
    assert negotiate("a/x;q=0, a/*", offers) == "a/y"
    assert negotiate("c/c", offers) is None
    assert negotiate("a/x;q=nonsense", offers) is None


# --- what the store keeps -----------------------------------------------------------------------------------


async def test_a_result_that_was_removed_is_gone_and_says_why() -> None:
    engine = StubEngine()
    run = engine.start()
    engine.end(run, result=7)
    engine.store.rows[run.no].result = None
    engine.store.rows[run.no].result_expired = True
    async with client_of(engine) as client:
        response = await client.get(f"{RUNS}/{run.id}/result")
        assert response.status_code == 410
        problem = response.json()
        assert problem["type"] == "urn:bulkhead:problem:result-expired"
        assert "RESULT_TTL" in problem["detail"]
        assert problem["run"] == run.id
        snapshot = (await client.get(f"{RUNS}/{run.id}")).json()
        assert (snapshot["status"], snapshot["result"]) == ("SUCCESSFUL", None)
        assert snapshot["result_expired"] is True


async def test_statistics_tell_what_the_store_takes() -> None:
    async with client_of(StubEngine()) as client:
        found = (await client.get("/api/v1/stats")).json()
        assert found["store"] == {
            "file_bytes": 8192,
            "wal_bytes": 0,
            "free_bytes": 0,
            "event_bytes": 100,
            "blobs": 0,
            "blob_bytes": 0,
            "incremental": True,
        }
        assert found["retention"]["passes"] == 0


async def test_a_vacuum_needs_an_operator() -> None:
    engine = StubEngine()
    path = "/api/v1/vacuum"
    async with client_of(engine, token(actions=["read", "submit"])) as client:
        assert (await client.post(path)).status_code == 403
    async with client_of(engine) as client:
        assert (await client.post(path, json={"pages": 1})).status_code == 422
        answer = await client.post(path, json={})
        assert answer.status_code == 200
        found = answer.json()
        assert found.pop("seconds") >= 0
        assert found == {"freed_bytes": 0, "free_bytes": 0, "file_bytes": 8192, "incremental": True}
        engine.store.upkeep.used = dataclasses.replace(engine.store.upkeep.used, incremental=False)
        refused = await client.post(path)
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:bulkhead:problem:not-incremental")
        assert "VACUUM" in refused.json()["detail"]
