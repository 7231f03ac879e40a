"""WebSocket clients of both seeds against a real tree, from the handshake to the close."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import Tree, eventually
from tests.websockets import SocketClient

KEYS = {
    *("task_id", "task_name", "status", "result", "error", "submitted_at", "started_at", "finished_at"),
    *("retries", "args", "kwargs"),
}


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give one tree for all of this module."""
    with Tree(runners=3) as tree:
        yield tree


def flowrra(tree: Tree) -> SocketClient:
    return SocketClient(tree.url, "/flowrra/ws", token=tree.token())


def is_over(message: dict[str, Any]) -> bool:
    return message["type"] == "task.update" and message["task"]["status"] in ("success", "failed")


def tasks_of(messages: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """Return the tasks in Flowrra's messages about one run."""
    tasks = [message["task"] for message in messages if message["type"] == "task.update"]
    return [task for task in tasks if task["task_id"] == run]


def frames_of(messages: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """Return the data in bazis's frames about one run."""
    data = [json.loads(message["data"]) for message in messages if message["type"] == "data"]
    return [each for each in data if each["task_id"] == run]


def test_a_whole_run_in_flowrras_words(tree: Tree) -> None:
    with flowrra(tree) as client:
        run = tree.submit("proj.add", a=1, b=2)["id"]
        tasks = tasks_of(client.until(is_over), run)
    assert [task["status"] for task in tasks] == ["pending", "running", "success"]
    for task in tasks:
        assert task.keys() == KEYS
        assert (task["task_name"], task["args"], task["kwargs"]) == ("proj.add", [], {"a": 1, "b": 2})
        assert task["submitted_at"] == tasks[0]["submitted_at"]
    assert (tasks[-1]["result"], tasks[-1]["error"], tasks[-1]["retries"]) == (3, None, 0)
    assert tasks[-1]["finished_at"] >= tasks[-1]["started_at"] == tasks[1]["started_at"]


def test_retries_are_seen(tree: Tree) -> None:
    with flowrra(tree) as client:
        run = tree.submit("proj.flaky", succeed_on=3)["id"]
        tasks = tasks_of(client.until(is_over), run)
    assert [(task["status"], task["retries"]) for task in tasks] == [
        ("pending", 0),
        ("running", 0),
        ("retrying", 0),
        ("running", 1),
        ("retrying", 1),
        ("running", 2),
        ("success", 2),
    ]


def test_a_failure_has_its_error(tree: Tree) -> None:
    with flowrra(tree) as client:
        run = tree.submit("proj.boom", message="no luck")["id"]
        last = tasks_of(client.until(is_over), run)[-1]
    assert (last["status"], last["error"], last["result"]) == ("failed", "no luck", None)


def test_who_comes_late_gets_a_snapshot_and_the_cancelled_end(tree: Tree) -> None:
    run = tree.submit("proj.patient")["id"]
    eventually(lambda: tree.snapshot(run)["status"] == "RUNNING")
    with flowrra(tree) as client:
        first = client.until(lambda message: tasks_of([message], run))
        assert first[-1]["task"]["status"] == "running"
        tree.http.post(f"/api/v1/runs/{run}/cancel", json={})
        last = tasks_of(client.until(is_over), run)[-1]
    assert last["status"] == "failed"
    assert "cancel" in last["error"]


def test_a_filter_selects(tree: Tree) -> None:
    with flowrra(tree) as client:
        client.say({"type": "subscribe", "task": "proj.a*", "status": "success"})
        client.until(lambda message: message["type"] == "subscribed")
        tree.wait(tree.submit("proj.echo", value=1)["id"])
        run = tree.submit("proj.add", a=2, b=2)["id"]
        found = client.until(is_over)
    assert [message["task"]["task_id"] for message in found] == [run]


def test_the_channel_of_a_user(tree: Tree) -> None:
    ann, bob = tree.client(subject="ann"), tree.client(subject="bob")
    # As bazis's clients connect: with the token in the address.
    with SocketClient(tree.url, f"/ws?token={tree.token(subject='ann', actions=['read'])}") as client:
        assert client.until(lambda message: True) == [{"type": "subscribed"}]
        other = bob.post("/api/v1/runs", json={"task": "proj.echo"}).json()["id"]
        tree.wait(other)
        mine = ann.post("/api/v1/runs", json={"task": "proj.echo"}).json()["id"]
        found = client.until(lambda message: "completed" in message["data"])
        client.say({"type": "ping"})
        assert client.until(lambda message: True) == [{"type": "pong"}]
    assert frames_of(found, other) == []
    assert frames_of(found, mine) == [
        {"task_id": mine, "status": status, "action": "async_bg"}
        for status in ("pending", "processing", "completed")
    ]
    assert "token=" not in tree.tail(100_000)


def test_events_by_cursor_are_those_of_the_stream(tree: Tree) -> None:
    run = tree.submit("proj.count", n=5, delay=0.02)["id"]
    eventually(lambda: tree.snapshot(run)["offsets"]["last"] >= 2)
    with SocketClient(tree.url, "/ws", token=tree.token()) as client:
        client.say({"type": "subscribe", "run": run, "after": "2"})
        found = client.until(lambda message: message.get("event") == "stream.end")
    events = [message for message in found if message["type"] == "event"]
    stream = tree.events(run, after="2")
    assert [(event["id"], event["event"], event["data"]) for event in events] == [
        (event.id, event.type, event.json) for event in stream
    ]
    assert len(events) == 5


def test_the_connection_ends_with_its_token(tree: Tree) -> None:
    short = tree.token(ttl=2)
    with SocketClient(tree.url, "/ws", token=short) as client, flowrra(tree) as other:
        with SocketClient(tree.url, f"/flowrra/ws?token={short}") as renewed:
            renewed.say({"token": tree.token()})
            assert client.rest()[-1]["code"] == "expired_token"
            assert client.code == 1008
            run = tree.submit("proj.echo")["id"]
            assert tasks_of(renewed.until(is_over), run)
        assert tasks_of(other.until(is_over), run)


def test_refusals_are_problems(tree: Tree) -> None:
    attempts = [
        (401, SocketClient(tree.url, "/ws")),
        (401, SocketClient(tree.url, "/flowrra/ws", token="x.y.z")),
        (403, SocketClient(tree.url, "/ws", token=tree.token(actions=["submit"]))),
        (403, SocketClient(tree.url, "/ws", "Origin: https://evil.example", token=tree.token())),
        (404, SocketClient(tree.url, "/api/v1/runs", token=tree.token())),
    ]
    for status, client in attempts:
        client.close()
        assert client.status == status
        assert "application/problem+json" in client.head
        assert json.loads(client.body)["status"] == status
    assert tree.http.get("/ws").status_code == 426


def test_a_gateway_that_is_killed_is_come_back_to(tree: Tree) -> None:
    patient = tree.submit("proj.patient")["id"]
    run = tree.submit("proj.count", n=40, delay=0.05)["id"]
    with SocketClient(tree.url, "/ws", token=tree.token()) as client:
        client.say({"type": "subscribe", "run": run, "after": "0"})
        found = client.until(lambda message: message.get("id") == "5")
        tree.kill("gateway", signal.SIGKILL)
        found += _what_still_comes(client)
        assert client.code is None
    seen = [message["id"] for message in found if message["type"] == "event"]

    def back() -> SocketClient | None:
        try:
            return SocketClient(tree.url, "/ws", token=tree.token())
        except (OSError, AssertionError):
            return None

    with eventually(back, 20.0) as client:
        client.say({"type": "subscribe", "run": run, "after": seen[-1]})
        found = client.until(lambda message: message.get("event") == "stream.end", 20.0)
    seen += [message["id"] for message in found if message["type"] == "event"]
    assert seen == [str(number) for number in range(1, 43)]
    with flowrra(tree) as client:
        (task,) = tasks_of(client.until(lambda message: tasks_of([message], patient)), patient)
        assert task["status"] == "running"
        tree.http.post(f"/api/v1/runs/{patient}/cancel", json={})
        client.until(is_over)


def _what_still_comes(client: SocketClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        found += client.read()
    except ConnectionResetError:
        pass
    return found


def test_at_last_a_stop_closes_with_1001(tree: Tree) -> None:
    """The last test: it needs the tree of all of them."""
    clients = [SocketClient(tree.url, path, token=tree.token()) for path in ("/ws", "/flowrra/ws")]
    assert tree.stop() == 0
    for client in clients:
        client.rest()
        assert client.code == 1001
        client.close()
