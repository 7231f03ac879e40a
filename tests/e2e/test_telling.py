"""Tasks that wait for what somebody tells them, with every process that may die in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from taskkit.client import Client
from tests.helpers import Tree, eventually


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    pools = {
        "default": {"runners": 2},
        "shared": {"runners": 4, "concurrency": 4, "runs": 1000},
        "again": {"runners": 1, "runs": 9},
    }
    with Tree(env={"TASKKIT_POOLS": json.dumps(pools)}) as running:
        yield running


def submit(tree: Tree, task: str, options: dict[str, Any] | None = None, **kwargs: Any) -> str:
    answer = tree.http.post("/api/v1/runs", json={"task": task, "kwargs": kwargs, **(options or {})})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def tell(tree: Tree, run: str, name: str = "answer", key: str | None = None, **data: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    return tree.http.post(f"/api/v1/runs/{run}/input/{name}", json=data, headers=headers)


def told(tree: Tree, run: str, n: int) -> bool:
    """Tell a run something by a key of its own; return whether that was answered."""
    try:
        return bool(tell(tree, run, key=f"n{n}", n=n).status_code in (200, 202))
    except httpx.TransportError:
        return False


def asks(tree: Tree, run: str, times: int = 1) -> None:
    """Wait until a task asks."""
    eventually(lambda: tree.snapshot(run)["offsets"]["last"] > times, 20.0, "a question")


@pytest.mark.parametrize(
    ("task", "pool"),
    [
        ("proj.ask", "default"),
        ("proj.ask", "again"),
        ("proj.ask_in_thread", "default"),
        ("proj.ask_async", "default"),
        ("proj.ask_trio", "default"),
        ("proj.ask_async", "shared"),
    ],
)
def test_a_task_hears_what_it_is_told(tree: Tree, task: str, pool: str) -> None:
    for _ in range(2):
        run = submit(tree, task, {"pool": pool})
        asks(tree, run)
        answer = tell(tree, run, yes=True)
        assert (answer.status_code, answer.json()) == (202, {"id": run, "name": "answer", "number": 1})
        heard = {"yes": True}
        assert tree.wait(run, 20.0)["result"] == (heard if task.endswith("thread") else [heard])


def test_the_client_tells_in_both_ways(tree: Tree) -> None:
    run = submit(tree, "proj.ask", n=3)
    client = Client(tree.url, token=tree.token())

    async def tell_asynchronously() -> int:
        try:
            return int((await client.ainput(run, "answer"))["number"])
        finally:
            await client.aclose()

    try:
        assert client.input(run, "answer", {"n": 1})["number"] == 1
        for _ in range(2):
            assert client.input(run, "answer", {"n": 2}, idempotency_key="k")["number"] == 2
        assert anyio.run(tell_asynchronously) == 3
    finally:
        client.close()
    assert tree.wait(run, 20.0)["result"] == [{"n": 1}, {"n": 2}, {}]


def test_names_are_told_apart_and_the_order_is_kept(tree: Tree) -> None:
    run = submit(tree, "proj.ask", name="b.c:d", n=3)
    for n in range(3):
        assert tell(tree, run, "a", n=n).status_code == 202
        assert tell(tree, run, "b.c%3Ad" if n else "b.c:d", n=n).status_code == 202
    assert tree.wait(run, 20.0)["result"] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_what_came_before_the_task_asked_is_there(tree: Tree) -> None:
    run = submit(tree, "proj.ask", {"run_after": "2999-01-01T00:00:00Z"})
    assert tell(tree, run, early=True).status_code == 202
    assert tree.snapshot(run)["status"] == "READY"
    tree.http.post(f"/api/v1/runs/{run}/cancel")
    assert tell(tree, run, late=True).status_code == 409


def test_every_attempt_hears_all_of_it(tree: Tree) -> None:
    run = submit(tree, "proj.ask", n=2, fail=2)
    asks(tree, run)
    tell(tree, run, n=1)
    tell(tree, run, n=2)
    snapshot = tree.wait(run, 20.0)
    assert (snapshot["attempt"], snapshot["result"]) == (3, [{"n": 1}, {"n": 2}])


def test_a_repeat_is_heard_once(tree: Tree) -> None:
    run = submit(tree, "proj.ask", n=2)
    first, second = (tell(tree, run, key="k", n=1) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 200)
    assert second.headers["Idempotency-Replayed"] == "true"
    assert tell(tree, run, key="k", n=2).status_code == 409
    tell(tree, run, n=2)
    assert tree.wait(run, 20.0)["result"] == [{"n": 1}, {"n": 2}]


def test_a_task_that_hears_nothing_goes_on_at_its_timeout(tree: Tree) -> None:
    run = submit(tree, "proj.ask_async", timeout=0.2)
    assert tree.wait(run, 20.0)["error"]["exception"] == "builtins.TimeoutError"


@pytest.mark.parametrize("task", ["proj.ask", "proj.ask_async", "proj.ask_trio"])
def test_one_that_waits_can_be_cancelled(tree: Tree, task: str) -> None:
    run = submit(tree, task)
    asks(tree, run)
    tree.http.post(f"/api/v1/runs/{run}/cancel")
    snapshot = tree.wait(run, 20.0)
    assert snapshot["status"] == "CANCELLED"
    assert snapshot["attempts"][-1]["ending"] == "cancelled", "it was not killed"


@pytest.mark.parametrize("who", ["gateway", "runner"])
def test_nothing_is_lost_or_heard_twice_whoever_dies(tree: Tree, who: str) -> None:
    run = submit(tree, "proj.ask", n=4)
    asks(tree, run)
    for n in (1, 2):
        assert tell(tree, run, n=n).status_code == 202
    asks(tree, run, 3)
    runner = tree.snapshot(run)["attempts"][-1]["pid"]
    os.kill(tree.child("gateway").pid if who == "gateway" else runner, signal.SIGKILL)
    for n in (3, 4):
        eventually(lambda n=n: told(tree, run, n), 20.0, "an answer")
    snapshot = tree.wait(run, 20.0)
    assert snapshot["result"] == [{"n": n} for n in (1, 2, 3, 4)]
    assert len(snapshot["attempts"]) == (1 if who == "gateway" else 2)


def test_who_may_not_cancel_a_run_may_not_tell_it_anything(tree: Tree) -> None:
    run = submit(tree, "proj.ask")
    for claims, status in (
        ({"actions": ("read", "submit"), "runs": (run,)}, 403),
        ({"actions": ("cancel",), "runs": ("00000000-0000-7000-8000-000000000001",)}, 404),
        ({"actions": ("cancel",), "runs": (run,)}, 202),
    ):
        headers = {"Authorization": f"Bearer {tree.token(tasks=(), **claims)}"}
        answer = tree.http.post(f"/api/v1/runs/{run}/input/answer", json={}, headers=headers)
        assert answer.status_code == status
    tree.wait(run, 20.0)


@pytest.mark.parametrize(
    ("name", "content", "status", "code"),
    [
        ("a", b"[1]", 400, "bad-json"),
        ("a", b'{"x":', 400, "bad-json"),
        ("a", b'{"x":"' + b"y" * 70_000 + b'"}', 413, "too-large"),
        ("a" * 101, b"{}", 400, "bad-parameter"),
        ("a%0Ab", b"{}", 400, "bad-parameter"),
        ("a%20b", b"{}", 400, "bad-parameter"),
    ],
)
def test_bad_input_is_refused_by_name(tree: Tree, name: str, content: bytes, status: int, code: str) -> None:
    run = submit(tree, "proj.ask", {"run_after": "2999-01-01T00:00:00Z"})
    headers = {"Content-Type": "application/json"}
    answer = tree.http.post(f"/api/v1/runs/{run}/input/{name}", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["type"].endswith(code)
    tree.http.post(f"/api/v1/runs/{run}/cancel")
