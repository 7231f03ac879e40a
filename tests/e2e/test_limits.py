"""Limits of a run's time: asked first where it may be, ended where it must be, with the right status and cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import Tree, eventually, is_alive
from tests.project.limits import SHORT

#: Seconds for what takes one or two, on a machine that others keep busy.
SOON = 20.0


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=3) as tree:
        yield tree


@dataclass(frozen=True)
class Case:
    """How a task ends that exceeds its limit.

    Attributes:
      task: its name.
      cause: the kind of its attempt's cause.
      signal: what ended its process; None: it stopped when it was asked to.
      exception: what it let pass, as the attempt's failure.
      tidied: its `finally` has run.
    """

    task: str
    cause: str
    signal: str | None = None
    exception: str | None = None
    tidied: bool = False


CASES = (
    Case("soft", "soft_timeout", exception="taskkit.errors.SoftTimeout", tidied=True),
    Case("asoft", "soft_timeout", tidied=True),
    Case("deaf", "timeout", signal="SIGKILL"),
    Case("halted", "timeout", signal="SIGKILL"),
    Case("summing", "timeout", signal="SIGTERM"),
    Case("burning", "cpu_timeout", signal="SIGTERM"),
    Case("burning_child", "cpu_timeout", signal="SIGTERM"),
    Case("silent", "stall_timeout", exception="taskkit.errors.StallTimeout", tidied=True),
    Case("silent_and_deaf", "stall_timeout", signal="SIGKILL"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_run_that_exceeds_a_limit_has_timed_out(tree: Tree, case: Case) -> None:
    run = tree.submit(f"proj.{case.task}")["id"]
    ended = tree.wait(run, timeout=SOON)
    assert (ended["status"], ended["error"]["code"]) == ("FAILED", "timed_out")
    (attempt,) = ended["attempts"]
    cause = attempt["cause"]
    assert (attempt["ending"], cause["kind"], cause.get("signal")) == ("timed_out", case.cause, case.signal)
    assert ended["error"].get("exception") == case.exception
    events = tree.events(run)
    assert [event.json["cancelled"] for event in events if event.type == "tidied"] == [True] * case.tidied
    assert [event.type for event in events].count("stream.end") == 1
    children = [pid for event in events if event.type == "ready" for pid in event.json.get("pids", [])]
    eventually(lambda: not any(is_alive(psutil.Process(p)) for p in children if psutil.pid_exists(p)), SOON)


def test_what_is_caught_at_a_soft_timeout_can_be_made_the_best_of(tree: Tree) -> None:
    ended = tree.wait(tree.submit("proj.content")["id"], timeout=SOON)
    assert (ended["status"], ended["result"]) == ("SUCCESSFUL", "partial")


def test_a_deaf_task_was_asked_before(tree: Tree) -> None:
    run = tree.submit("proj.deaf")["id"]
    tree.wait(run, timeout=SOON)
    assert [event.json["by"] for event in tree.events(run) if event.type == "asked"] == ["SoftTimeout"]


@pytest.mark.parametrize("task", ["dozing", "talkative"])
def test_only_what_is_limited_is_counted(tree: Tree, task: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = submit(tree, f"proj.{task}", kwargs={"gate": str(gate)})
    other = tree.submit("proj.silent")["id"]  # its limit passes once or twice meanwhile
    tree.wait(other, timeout=SOON)
    assert tree.snapshot(run)["status"] == "RUNNING"
    gate.touch()
    assert tree.wait(run, timeout=SOON)["status"] == "SUCCESSFUL"


@pytest.mark.parametrize("task", ["cooperative", "acooperative"])
def test_a_task_sees_that_it_was_cancelled(tree: Tree, task: str) -> None:
    run = tree.submit(f"proj.{task}")["id"]
    eventually(lambda: "ready" in [event["type"] for event in page(tree, run)], SOON)
    assert tree.http.post(f"/api/v1/runs/{run}/cancel", json={"grace": 60}).status_code == 202
    ended = tree.wait(run, timeout=SOON)
    assert (ended["status"], ended["result"]) == ("SUCCESSFUL", "stopped"), "it returned all the same"


def submit(tree: Tree, task: str, **options: Any) -> str:
    """Submit with options; return the run's id."""
    response = tree.http.post("/api/v1/runs", json={"task": task, **options})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def page(tree: Tree, run: str) -> list[dict[str, Any]]:
    answer = tree.http.get(f"/api/v1/runs/{run}/events", headers={"Accept": "application/json"}).json()
    return list(answer["events"])


def test_limits_of_a_submission_stand_above_those_of_its_task(tree: Tree) -> None:
    run = submit(tree, "proj.patient", soft_timeout=SHORT, timeout=50)
    ended = tree.wait(run, timeout=SOON)
    assert (ended["soft_timeout"], ended["timeout"]) == (SHORT, 50)
    assert ended["error"]["cause"]["kind"] == "soft_timeout"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"soft_timeout": 5, "timeout": 5}, "soft_timeout"),
        ({"cpu_timeout": 0}, "cpu_timeout"),
        ({"stall_timeout": "1s"}, "stall_timeout"),
        ({"schedule_timeout": -1}, "schedule_timeout"),
    ],
)
def test_nonsensical_limits_are_422(tree: Tree, options: dict[str, Any], field: str) -> None:
    response = tree.http.post("/api/v1/runs", json={"task": "proj.echo", **options})
    assert (response.status_code, list(response.json()["errors"])) == (422, [field])


def test_a_run_that_waits_too_long_ends_unstarted_and_a_backoff_holds_no_runner() -> None:
    with Tree(runners=1) as tree:
        hindered = tree.submit("proj.patient")["id"]
        eventually(lambda: tree.snapshot(hindered)["status"] == "RUNNING", SOON)
        late = submit(tree, "proj.echo", schedule_timeout=SHORT)
        ended = tree.wait(late, timeout=SOON)
        assert (ended["status"], ended["error"]["code"], ended["attempts"]) == ("FAILED", "expired", [])
        assert [event.type for event in tree.events(late)] == ["stream.end"]
        assert tree.snapshot(hindered)["status"] == "RUNNING"
        tree.http.post(f"/api/v1/runs/{hindered}/cancel", json={})

        retried = tree.submit("proj.tries_later")["id"]
        eventually(lambda: "run.retrying" in [event["type"] for event in page(tree, retried)], SOON)
        assert tree.wait(submit(tree, "proj.echo", schedule_timeout=60), timeout=SOON)["attempts"]
        waiting = tree.snapshot(retried)
        assert (waiting["status"], waiting["attempt"]) == ("READY", 1), "the only runner served another run"
        assert tree.wait(retried, timeout=SOON)["result"] == 2
