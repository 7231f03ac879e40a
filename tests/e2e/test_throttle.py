"""Limits per key: they hold whoever dies, and whoever waits for one hinders nobody else."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers import Tree, eventually

#: Seconds for what takes one or two, on a machine that others keep busy.
SOON = 40.0


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=4) as tree:
        yield tree


def submit(tree: Tree, *items: dict[str, Any]) -> list[str]:
    response = tree.http.post("/api/v1/runs/batch", json={"runs": list(items)})
    assert response.status_code == 200, response.text
    return [outcome["id"] for outcome in response.json()["runs"]]


def narrow(key: str, **kwargs: Any) -> dict[str, Any]:
    return {"task": "proj.narrow", "kwargs": kwargs, "concurrency_key": key}


def test_runs_of_one_key_come_one_after_the_other_through_deaths_of_the_gateway(tree: Tree) -> None:
    keys = [f"user-{no % 3}" for no in range(24)]
    runs = submit(tree, *(narrow(key) for key in keys))
    for done in (3, 12):
        eventually(lambda done=done: ended(tree, runs) >= done, SOON)
        tree.kill("gateway")
    times: dict[str, list[list[float]]] = {}
    for key, run in zip(keys, runs, strict=True):
        snapshot = end_of(tree, run)
        assert (snapshot["status"], snapshot["concurrency_key"]) == ("SUCCESSFUL", key)
        times.setdefault(key, []).append(snapshot["result"])
    for spans in times.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def ended(tree: Tree, runs: list[str]) -> int:
    return sum(seen(tree, run)["status"] == "SUCCESSFUL" for run in runs)


def seen(tree: Tree, run: str) -> dict[str, Any]:
    """Return the run's snapshot, from the gateway that answers next."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(httpx.TransportError):
            return tree.snapshot(run)
        return None

    return eventually(look, SOON)


def end_of(tree: Tree, run: str) -> dict[str, Any]:
    eventually(lambda: seen(tree, run)["finished_at"], SOON)
    return seen(tree, run)


@pytest.mark.alone
def test_no_more_begin_in_any_such_time_through_deaths_of_the_gateway(tree: Tree) -> None:
    runs = submit(tree, *({"task": "proj.metered"} for _ in range(10)))
    for done in (2, 5):
        eventually(lambda done=done: ended(tree, runs) >= done, SOON)
        tree.kill("gateway")
    times = sorted(end_of(tree, run)["result"] for run in runs)
    spans = [later - first for first, later in zip(times, times[3:], strict=False)]
    assert min(spans) >= 0.99, spans


def test_thousands_that_wait_for_one_key_hinder_nobody(tree: Tree, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first, *rest = (
        run for _ in range(2) for run in submit(tree, *[narrow("busy", seconds=0, gate=str(gate))] * 1000)
    )
    eventually(lambda: tree.snapshot(first)["status"] == "RUNNING", SOON)
    for _ in range(20):
        assert tree.wait(tree.submit("proj.echo")["id"], timeout=SOON)["status"] == "SUCCESSFUL"
    (other,) = submit(tree, narrow("idle"))
    assert tree.wait(other, timeout=SOON)["status"] == "SUCCESSFUL"
    assert tree.snapshot(first)["status"] == "RUNNING"
    for run in rest[-20:]:
        assert tree.http.post(f"/api/v1/runs/{run}/cancel", json={}).status_code == 202
    gate.touch()
    assert tree.wait(rest[0], timeout=SOON)["status"] == "SUCCESSFUL"
    assert tree.snapshot(rest[-1])["status"] == "CANCELLED"


def test_a_key_that_nothing_can_share_is_422(tree: Tree) -> None:
    response = tree.http.post("/api/v1/runs", json={"task": "proj.echo", "concurrency_key": "a"})
    assert (response.status_code, list(response.json()["errors"])) == (422, ["concurrency_key"])
    task = tree.http.get("/api/v1/tasks/proj.narrow").json()
    assert (task["concurrency"], task["rate_limit"]) == (1, None)
    assert tree.http.get("/api/v1/tasks/proj.metered").json()["rate_limit"] == "3/1s"
