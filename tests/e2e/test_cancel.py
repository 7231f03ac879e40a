"""Cancelling: asked first, then TERM, then KILL, whatever a task does and whatever it has started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers import Tree, eventually, is_alive

#: Seconds for what takes milliseconds, on a machine that others keep busy.
SOON = 10.0

#: A grace that nobody waits for.
LONG = 60.0

#: A grace that passes, and what the tests' project has between TERM and KILL.
SHORT, KILL_GRACE = 0.3, 0.5


@dataclass(frozen=True)
class Case:
    """How a task ends that is cancelled.

    Attributes:
      task: its name.
      signal: what ended its process; None: it stopped by itself, long before its grace was over.
      says: an event between `run.cancelling` and the end.
      ready: the event that tells its processes.
    """

    task: str
    signal: str | None = None
    says: str = ""
    ready: str = "ready"


CASES = (
    # asked, they stop
    Case("patient", says="cleaned_up"),
    Case("apatient", says="cleaned_up"),
    Case("busy_loop", says="cleaned_up"),
    Case("swallow"),
    Case("slow_gen", says="cleaned_up", ready="progress"),
    Case("slow_agen", says="cleaned_up", ready="progress"),
    Case("with_child"),
    Case("with_tree"),
    Case("with_async_child"),
    Case("with_deaf_child"),
    Case("daemonise", ready="daemon"),
    Case("daemonise_by_fork", ready="daemon"),
    # they do not hear of it
    Case("c_loop", signal="SIGTERM"),
    Case("ac_loop", signal="SIGTERM"),
    Case("in_thread", signal="SIGTERM"),
    Case("astubborn", signal="SIGTERM"),
    # they do not even mind SIGTERM
    Case("stubborn", signal="SIGKILL"),
)


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=3) as tree:
        yield tree


def ready(tree: Tree, run: str, event: str) -> list[psutil.Process]:
    """Wait until a run says that it is ready; return the processes that it has made."""

    def said() -> dict[str, Any] | None:
        page = tree.http.get(f"/api/v1/runs/{run}/events", headers={"Accept": "application/json"}).json()
        return next((one["data"] for one in page["events"] if one["type"] == event), None)

    data = eventually(said, SOON, f"{event} of {run}")
    return [psutil.Process(pid) for pid in data.get("pids", [data["pid"]] if "pid" in data else [])]


def cancel(tree: Tree, run: str, **body: Any) -> httpx.Response:
    return tree.http.post(f"/api/v1/runs/{run}/cancel", json=body)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_cancelled_run_stops_with_all_that_it_has_started(tree: Tree, case: Case) -> None:
    run = tree.submit(f"proj.{case.task}")["id"]
    started = ready(tree, run, case.ready)
    assert all(map(is_alive, started))
    began = time.monotonic()
    response = cancel(tree, run, grace=LONG if case.signal is None else SHORT)
    assert (response.status_code, response.json()["cancelling"]) == (202, True)
    ended = tree.wait(run, timeout=2 * SOON)
    took = time.monotonic() - began
    assert ended["status"] == "CANCELLED"
    (attempt,) = ended["attempts"]
    assert attempt["ending"] == "cancelled"
    if case.signal is None:
        assert attempt["cause"] is None
        assert took < SOON
    else:
        assert (attempt["cause"]["kind"], attempt["cause"]["signal"]) == ("cancelled", case.signal)
        assert took >= SHORT + (KILL_GRACE if case.signal == "SIGKILL" else 0)
        assert took < SHORT + KILL_GRACE + SOON
    names = [event.type for event in tree.events(run)]
    assert names[-1] == "stream.end"
    assert names.count("run.cancelling") == 1
    assert not case.says or names.index("run.cancelling") < names.index(case.says)
    eventually(lambda: not any(map(is_alive, started)), SOON, f"the end of {started}")


def test_a_run_that_waits_is_cancelled_at_once(tree: Tree) -> None:
    body = {"task": "proj.echo", "run_after": "2099-01-01T00:00:00Z"}
    run = tree.http.post("/api/v1/runs", json=body).json()["id"]
    assert cancel(tree, run, grace=LONG).json()["status"] == "CANCELLED"
    assert [event.type for event in tree.events(run)] == ["stream.end"]


def test_without_a_grace_it_is_that_of_the_settings(tree: Tree) -> None:
    run = tree.submit("proj.c_loop")["id"]
    ready(tree, run, "ready")
    began = time.monotonic()
    assert cancel(tree, run).status_code == 202
    assert tree.wait(run, timeout=SOON)["status"] == "CANCELLED"
    assert time.monotonic() - began >= 1.0, "LIMITS.cancel_grace_seconds of the tests' project"


@pytest.mark.parametrize("graces", [(LONG, SHORT), (SHORT, LONG)], ids=["shorter", "longer"])
def test_cancelling_again_can_only_shorten_the_grace(tree: Tree, graces: tuple[float, float]) -> None:
    run = tree.submit("proj.c_loop")["id"]
    ready(tree, run, "ready")
    assert [cancel(tree, run, grace=grace).status_code for grace in graces] == [202, 202]
    assert tree.wait(run, timeout=SOON)["status"] == "CANCELLED"
    events = tree.events(run)
    assert [event.json["grace"] for event in events if event.type == "run.cancelling"] == [graces[0]]


def test_what_has_ended_cannot_be_cancelled(tree: Tree) -> None:
    run = tree.submit("proj.echo")["id"]
    tree.wait(run)
    for _ in range(2):
        response = cancel(tree, run)
        assert response.status_code == 409
        assert response.json()["type"] == "urn:bulkhead:problem:run-finished"
    assert tree.snapshot(run)["status"] == "SUCCESSFUL"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"grace": -1}, "grace"),
        ({"grace": "5s"}, "grace"),
        ({"grace": True}, "grace"),
        ({"grace": 3601}, "grace"),
        ({"grace": [1]}, "grace"),
        ({"grace": 1, "force": True}, "force"),
    ],
)
def test_a_nonsensical_grace_is_422_and_cancels_nothing(tree: Tree, body: dict[str, Any], field: str) -> None:
    run = tree.http.post(
        "/api/v1/runs", json={"task": "proj.echo", "run_after": "2099-01-01T00:00:00Z"}
    ).json()["id"]
    response = tree.http.post(f"/api/v1/runs/{run}/cancel", json=body)
    assert (response.status_code, list(response.json()["errors"])) == (422, [field])
    assert not tree.snapshot(run)["cancelling"]
    assert tree.http.post(f"/api/v1/runs/{run}/cancel", content=b"").status_code == 202, "no body is a body"
