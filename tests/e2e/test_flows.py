"""Parents and children, groups and chains: told once, whoever dies; nobody waits for what will not come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from taskkit.identifiers import new_run_id
from tests.helpers import SseEvent, Tree, eventually

#: Seconds for what takes one or two, on a machine that others keep busy.
SOON = 60.0


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=4) as tree:
        yield tree


def submit(tree: Tree, task: str, *args: Any, **options: Any) -> str:
    response = tree.http.post("/api/v1/runs", json={"task": f"proj.{task}", "args": list(args), **options})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def ended(tree: Tree, run: str) -> dict[str, Any]:
    """Return the run when it has ended, from whichever gateway answers."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(httpx.TransportError):
            snapshot = tree.snapshot(run)
            return snapshot if snapshot["finished_at"] else None
        return None

    return eventually(look, SOON)


def events(tree: Tree, run: str) -> list[SseEvent]:
    return eventually(lambda: _events(tree, run), SOON)


def _events(tree: Tree, run: str) -> list[SseEvent]:
    with contextlib.suppress(OSError, httpx.TransportError):
        return tree.events(run)
    return []


def waiting_for(tree: Tree, run: str) -> list[str]:
    """Return the ids of the children that a run waits for, once it does."""

    def look() -> list[str] | None:
        answer = tree.http.get(f"/api/v1/runs/{run}/events", headers={"Accept": "application/json"}).json()
        said = [event["data"]["children"] for event in answer["events"] if event["type"] == "waiting"]
        return said[0] if said else None

    return eventually(look, SOON)


def child_events(found: list[SseEvent]) -> dict[str, list[str]]:
    """Return what a stream tells of each child, in its order."""
    told: dict[str, list[str]] = {}
    for event in found:
        if event.type.startswith("run.child."):
            told.setdefault(event.json["child"], []).append(event.type.removeprefix("run.child."))
    return told


def test_a_parent_hears_how_its_children_end_and_its_stream_tells_of_them(tree: Tree) -> None:
    run = submit(tree, "tree", [1, "bad", {"x": 2}])
    snapshot = ended(tree, run)
    assert (snapshot["status"], snapshot["result"]) == ("SUCCESSFUL", [1, "raised", {"x": 2}])
    assert snapshot["children"] == {"total": 3, "ended": 3, "failed": 1}
    found = events(tree, run)
    assert [int(event.id) for event in found] == list(range(1, len(found) + 1))
    told = child_events(found)
    assert list(told.values()) == [["submitted", "started", "ended"]] * 3
    last = [event.json for event in found if event.type == "run.child.ended"]
    assert last[-1]["children"] == {"total": 3, "ended": 3, "failed": 1}
    assert {one["status"] for one in last} == {"SUCCESSFUL", "FAILED"}
    listed = tree.http.get("/api/v1/runs", params={"parent": run}).json()["runs"]
    assert {one["id"] for one in listed} == set(told)
    assert {one["parent"] for one in listed} == {run}


def test_a_coroutine_waits_as_well(tree: Tree) -> None:
    assert ended(tree, submit(tree, "atree", [1, 2]))["result"] == [1, 2]


@pytest.mark.parametrize("victim", ["gateway", "courier", "zygote"])
def test_children_are_told_of_once_whoever_dies(tree: Tree, tmp_path: Path, victim: str) -> None:
    gate = tmp_path / "gate"
    run = submit(tree, "tree", list(range(8)), str(gate))
    children = waiting_for(tree, run)
    tree.kill(victim)
    gate.touch()
    if victim == "gateway":
        eventually(lambda: _ended_children(tree, run) >= 3, SOON)
        tree.kill(victim)
    snapshot = ended(tree, run)
    assert snapshot["result"] == list(range(8))
    found = events(tree, run)
    assert [int(event.id) for event in found] == list(range(1, len(found) + 1))
    told = child_events(found)
    assert set(told) == set(children)
    assert all((one.count("submitted"), one.count("ended")) == (1, 1) for one in told.values())


def _ended_children(tree: Tree, run: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return int(tree.snapshot(run)["children"]["ended"])
    return 0


def test_a_chain_with_a_group_goes_on_whoever_dies(tree: Tree, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = submit(tree, "conducting", str(gate))
    steps = waiting_for(tree, run)
    eventually(lambda: len(tree.http.get("/api/v1/runs", params={"parent": run}).json()["runs"]) == 4, SOON)
    eventually(lambda: tree.snapshot(steps[0])["status"] == "RUNNING", SOON)
    assert [tree.snapshot(one)["status"] for one in steps[1:]] == ["READY"] * 3
    tree.kill("gateway")
    gate.touch()
    assert ended(tree, run)["result"] == [[1, 2], [1, 3], 4]
    assert [ended(tree, one)["attempt"] for one in steps] == [1] * 4


def test_children_with_keys_outlive_an_attempt_of_their_parent(tree: Tree) -> None:
    run = submit(tree, "shaken", [1, 2, 3])
    snapshot = ended(tree, run)
    assert (snapshot["result"], snapshot["attempt"], snapshot["children"]["total"]) == ([1, 2, 3], 2, 3)


def test_what_comes_after_a_failure_ends_unstarted(tree: Tree, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    bad = submit(tree, "leaf", "bad", str(gate))
    first = submit(tree, "collected", after=[bad])
    second = submit(tree, "collected", after=[submit(tree, "leaf", 1), first])
    assert tree.snapshot(first)["after"] == [bad]
    gate.touch()
    for run, cause in ((first, bad), (second, first)):
        snapshot = ended(tree, run)
        assert (snapshot["status"], snapshot["error"]["code"]) == ("FAILED", "dependency_failed")
        assert (snapshot["error"]["run"], snapshot["attempts"]) == (cause, [])
        assert [event.type for event in events(tree, run)] == ["stream.end"]
    late = submit(tree, "collected", after=[first])
    assert ended(tree, late)["error"]["code"] == "dependency_failed"


def test_a_run_that_comes_after_ended_ones_has_their_results_in_order(tree: Tree) -> None:
    runs = [submit(tree, "leaf", value) for value in (1, 2, 3)]
    ended(tree, runs[0])
    assert ended(tree, submit(tree, "collected", after=runs))["result"] == [1, 2, 3]


def test_a_cancelled_parent_takes_its_children_along(tree: Tree, tmp_path: Path) -> None:
    run = submit(tree, "tree", list(range(6)), str(tmp_path / "gate"))
    children = waiting_for(tree, run)
    assert tree.http.post(f"/api/v1/runs/{run}/cancel", json={"grace": 30}).status_code == 202
    for one in (run, *children):
        assert ended(tree, one)["status"] == "CANCELLED"
    late = submit(tree, "leaf", parent=run)
    assert ended(tree, late)["status"] == "CANCELLED", "it has come too late for a parent that was cancelled"


def test_a_task_does_not_wait_for_what_will_not_come(tree: Tree) -> None:
    said = ended(tree, submit(tree, "impatient"))["result"]
    assert "is open" in said[0]
    assert "no child of this run" in said[-2]
    assert said[-1] == "TimeoutError"


def test_a_child_that_is_refused_is_told_of_as_failed(tree: Tree) -> None:
    run = submit(tree, "misdirected")
    snapshot = ended(tree, run)
    assert snapshot["result"] == "invalid-arguments"
    assert snapshot["children"] == {"total": 1, "ended": 1, "failed": 1}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"parent": "nobody"}, "parent"),
        ({"parent": new_run_id()}, "parent"),
        ({"after": ["x"]}, "after"),
        ({"after": [new_run_id()]}, "after"),
        ({"after": "x"}, "after"),
    ],
)
def test_relatives_that_there_are_not_are_422(tree: Tree, options: dict[str, Any], field: str) -> None:
    response = tree.http.post("/api/v1/runs", json={"task": "proj.echo", **options})
    assert (response.status_code, list(response.json()["errors"])) == (422, [field])


def test_a_run_beyond_the_tokens_reach_is_no_relative(tree: Tree) -> None:
    other = submit(tree, "leaf")
    ended(tree, other)
    with tree.client(actions=["submit", "read"], runs="own", tasks=["proj.echo"], subject="ann") as ann:
        for options in ({"parent": other}, {"after": [other]}):
            response = ann.post("/api/v1/runs", json={"task": "proj.echo", **options})
            assert response.status_code == 422
            batch = ann.post("/api/v1/runs/batch", json={"runs": [{"task": "proj.echo", **options}]}).json()
            assert batch["runs"][0]["status"] == 422
