"""The demo's tree, brought to a known state before something is measured on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.helpers import Tree, eventually

#: Runs at once in the measured trees.
RUNNERS = 4

#: What "under load" means: as many tasks that never wait as a small machine has cores.
BURNS = 2

#: Seconds that a burning task would go on; it is cancelled long before.
BURN_SECONDS = 600.0


def demo_tree() -> Tree:
    """Return the demo's tree on a state directory of its own, not started yet."""
    return Tree(settings=None, runners=RUNNERS)


def await_idle(tree: Tree, count: int) -> None:
    """Wait until the default pool has `count` runners without work and nobody retires."""

    def idle() -> bool:
        runners = [
            one for one in tree.http.get("/api/v1/runners").json()["runners"] if one["role"] == "runner"
        ]
        states = [one["state"] for one in runners if one["state"] != "BUSY"]
        return states == ["IDLE"] * count

    eventually(idle, 30.0, f"{count} idle runners")


@contextmanager
def cancelled_at_end(tree: Tree, orders: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[str]]:
    """Have runs (task, arguments) at work while the block runs; give their ids."""
    runs = [tree.submit(task, **arguments)["id"] for task, arguments in orders]

    def all_run() -> bool:
        return all(tree.snapshot(run)["status"] == "RUNNING" for run in runs)

    try:
        eventually(all_run, 30.0, "runs at work")
        yield runs
    finally:
        for run in runs:
            tree.http.post(f"/api/v1/runs/{run}/cancel", json={"grace": 0})
        for run in runs:
            tree.wait(run, 30.0)


@contextmanager
def burning(tree: Tree) -> Iterator[None]:
    """Have BURNS tasks burn while the block runs."""
    with cancelled_at_end(tree, [("demo.burn", {"seconds": BURN_SECONDS})] * BURNS):
        yield
