"""The seed's routes: a task row's stream while it runs, what became of it afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.helpers import RawResponse, SseEvent, Tree, eventually, raw_get

EVENT_STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the demo project's tree."""
    with Tree(settings=None, runners=4) as tree:
        yield tree


def start(tree: Tree, step_seconds: float = 0.05, message: str = "hello") -> tuple[str, int]:
    """Submit an ExampleTask; return its run and the key of its row."""
    fields = {"message": message, "step_seconds": step_seconds}
    response = tree.http.post("/api/v1/runs", json={"task": "demo.ExampleTask", "fields": fields})
    assert response.status_code == 202, response.text
    run: str = response.json()["id"]
    with tree.stream(run) as stream:
        pk = next(event for event in stream.events() if event.type == "start").json["_task_id"]
    return run, pk


def follow(tree: Tree, path: str, **options: Any) -> list[SseEvent]:
    """Return the events of a stream that ends by itself."""
    with open_stream(tree, path, **options) as response:
        assert response.status == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(response.events())


def open_stream(tree: Tree, path: str, **headers: str) -> RawResponse:
    return raw_get(tree.url + path, token=tree.token(), headers=EVENT_STREAM | headers)


def test_a_running_row_streams_its_steps_to_the_end(tree: Tree) -> None:
    run, pk = start(tree)
    events = follow(tree, f"/stream/demo/ExampleTask/{pk}")
    assert [event.type for event in events if not event.type.startswith("run.")] == [
        *("start", "progress", "progress", "progress", "complete", "stream.end")
    ]
    assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
    steps = [event.json for event in events if event.type == "progress"]
    assert [(step["step"], step["total_steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[0]["message"] == "Step 1 of 3: hello"
    assert events[-1].json["status"] == "SUCCESSFUL"
    assert events[-1].json["result"] == "Done: hello"
    own = [event.json for event in events[1:-1]]
    assert {(e["_run"], e["_app"], e["_model"], e["_task_id"]) for e in own} == {
        (run, "demo", "ExampleTask", pk)
    }


def test_it_is_the_stream_of_the_run(tree: Tree) -> None:
    run, pk = start(tree)
    by_row = follow(tree, f"/stream/demo/ExampleTask/{pk}")
    by_run = tree.events(run)
    assert [(e.id, e.type, e.data) for e in by_row] == [(e.id, e.type, e.data) for e in by_run]


@pytest.mark.parametrize(
    "path",
    [
        "/stream/demo/exampletask/{}",
        "/stream/DEMO/EXAMPLETASK/{}",
        "/stream/ExampleTask/{}",
        "/stream/exampleTask/{}",
    ],
)
def test_model_names_in_any_letter_case_are_one_run(tree: Tree, path: str) -> None:
    run, pk = start(tree)
    assert {event.json["_run"] for event in follow(tree, path.format(pk))[:-1]} == {run}


def test_a_stream_resumes_by_last_event_id_and_ends_with_204(tree: Tree) -> None:
    run, pk = start(tree)
    tree.wait(run)
    path = f"/stream/demo/ExampleTask/{pk}"
    everything = follow(tree, path)
    rest = follow(tree, path, **{"Last-Event-ID": everything[2].id})
    assert [event.id for event in rest] == [event.id for event in everything[3:]]
    with open_stream(tree, path, **{"Last-Event-ID": everything[-1].id}) as response:
        assert response.status == 204


def test_a_completed_row_is_json_for_who_asks_for_no_stream(tree: Tree) -> None:
    run, pk = start(tree)
    tree.wait(run)
    for accept in ("application/json", "*/*"):
        response = tree.http.get(f"/stream/demo/ExampleTask/{pk}", headers={"Accept": accept})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("application/json")
        answer = response.json()
        assert set(answer) == {"status", "final_value", "completed_at"}
        assert (answer["status"], answer["final_value"]) == ("completed", "Done: hello")
        assert answer["completed_at"]


def test_a_running_row_is_a_stream_for_anybody(tree: Tree) -> None:
    _, pk = start(tree, step_seconds=0.2)
    with raw_get(f"{tree.url}/stream/demo/ExampleTask/{pk}", token=tree.token()) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(response.events())[-1].type == "stream.end"


def test_the_result_is_there_for_who_asks_right_behind_complete(tree: Tree) -> None:
    # The seed's clients close their stream at `complete` and ask for the outcome at once.
    _, pk = start(tree)
    path = f"/stream/demo/ExampleTask/{pk}"
    with open_stream(tree, path) as response:
        next(event for event in response.events() if event.type == "complete")
        answer = tree.http.get(path, headers={"Accept": "application/json"})
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["final_value"] == "Done: hello"


def test_a_late_client_can_have_the_newest_event_only(tree: Tree) -> None:
    run, pk = start(tree)
    tree.wait(run)
    events = follow(tree, f"/stream/demo/ExampleTask/{pk}?replay=latest")
    assert [event.type for event in events] == ["stream.end"]


def problem(tree: Tree, method: str, path: str) -> dict[str, Any]:
    response = tree.http.request(method, path)
    assert response.headers["content-type"].startswith("application/problem+json"), response.text
    answer: dict[str, Any] = response.json()
    assert answer["status"] == response.status_code
    return answer


@pytest.mark.parametrize(
    "path",
    [
        "/stream/demo/ExampleTask/999999",
        "/stream/demo/NoSuchModel/1",
        "/stream/nowhere/ExampleTask/1",
        "/stream/NoSuchModel/1",
        "/stream/auth/User/1",
        "/stream/User/1",
    ],
)
def test_an_unknown_row_or_a_model_that_is_no_task_is_404(tree: Tree, path: str) -> None:
    answer = problem(tree, "GET", path)
    assert (answer["status"], answer["title"]) == (404, "Task not found")


@pytest.mark.parametrize("pk", ["nonsense", "1.5", "%F0%9F%9A%A2"])
def test_a_key_that_the_field_cannot_parse_is_400(tree: Tree, pk: str) -> None:
    assert problem(tree, "GET", f"/stream/demo/ExampleTask/{pk}")["status"] == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_other_methods_are_405(tree: Tree, method: str) -> None:
    assert problem(tree, method, "/stream/demo/ExampleTask/1")["status"] == 405


def test_head_tells_without_a_body(tree: Tree) -> None:
    run, pk = start(tree)
    tree.wait(run)
    response = tree.http.head(f"/stream/demo/ExampleTask/{pk}")
    assert (response.status_code, response.content) == (200, b"")


def test_a_token_that_does_not_reach_the_row_sees_nothing(tree: Tree) -> None:
    run, pk = start(tree)
    tree.wait(run)
    path = f"/stream/demo/ExampleTask/{pk}"
    mine = tree.client(actions=["read"], runs=[run], tasks=())
    other = tree.client(actions=["read"], runs=["00000000-0000-7000-8000-000000000000"], tasks=())
    assert mine.get(path, headers={"Accept": "application/json"}).status_code == 200
    foreign = other.get(path)
    assert (foreign.status_code, foreign.json()["title"]) == (404, "Task not found")


def test_a_get_starts_nothing(tree: Tree) -> None:
    run, pk = start(tree, step_seconds=30)
    assert tree.http.post(f"/api/v1/runs/{run}/cancel", json={"grace": 1}).status_code == 202
    tree.wait(run)
    path = f"/stream/demo/ExampleTask/{pk}"
    assert follow(tree, path)[-1].json["status"] == "CANCELLED"
    answer = tree.http.get(path, headers={"Accept": "application/json"})
    assert answer.json()["status"] == "cancelled"
    runs = tree.http.get("/api/v1/runs", params={"task": "demo.ExampleTask", "limit": 1}).json()["runs"]
    assert runs[0]["id"] == run, "no newer run of a task row"


# -- what the demo's rows do not do, from the tests' own project


@pytest.fixture(scope="module")
def project() -> Iterator[Tree]:
    """Give the tests' project's tree, with a row that always raises."""
    with Tree(runners=2) as tree:
        yield tree


def test_a_raised_exception_arrives_under_both_names_then_the_end(project: Tree) -> None:
    response = project.http.post("/api/v1/runs", json={"task": "proj.BadRow", "fields": {}})
    assert response.status_code == 202, response.text
    project.wait(response.json()["id"])
    events = follow(project, "/stream/proj/BadRow/1")
    assert [event.type for event in events] == ["run.started", "error", "task_error", "stream.end"]
    for event in events[1:3]:
        assert event.json["message"] == "this row is bad"
        assert event.json["error_type"] == "ValueError"
    assert events[-1].json["status"] == "FAILED"
    assert events[-1].json["error"]["exception"] == "builtins.ValueError"


def test_a_failed_row_is_not_started_again_by_a_get(project: Tree) -> None:
    response = project.http.post("/api/v1/runs", json={"task": "proj.BadRow", "fields": {}})
    run = response.json()["id"]
    project.wait(run)
    with closing(sqlite3.connect(project.database)) as connection:
        (pk,) = connection.execute("SELECT max(id) FROM proj_badrow").fetchone()
    path = f"/stream/proj/BadRow/{pk}"
    answer = project.http.get(path, headers={"Accept": "application/json"}).json()
    assert answer["status"] == "failed"
    assert answer["error"]["exception"] == "builtins.ValueError"
    runs = project.http.get("/api/v1/runs", params={"task": "proj.BadRow"}).json()["runs"]
    assert runs[0]["id"] == run


@pytest.mark.parametrize(
    ("model", "fields", "types"),
    [
        ("Row", {"message": "m", "steps": 2}, ["progress", "progress"]),
        ("ARow", {"message": "m", "steps": 1}, ["start", "progress", "complete"]),
        ("GenRow", {"steps": 2}, ["progress", "progress"]),
        ("AGenRow", {"steps": 2}, ["progress", "progress"]),
    ],
)
def test_every_kind_of_process_method_streams(
    project: Tree, model: str, fields: dict[str, Any], types: list[str]
) -> None:
    response = project.http.post("/api/v1/runs", json={"task": f"proj.{model}", "fields": fields})
    assert response.status_code == 202, response.text
    events = follow(project, f"/stream/proj/{model}/1")
    assert [event.type for event in events] == ["run.started", *types, "stream.end"]
    assert events[-1].json["status"] == "SUCCESSFUL"
    eventually(
        lambda: (
            project.http.get(f"/stream/{model}/1", headers={"Accept": "application/json"}).json()["status"]
            == "completed"
        ),
        5,
        "the row's outcome",
    )
