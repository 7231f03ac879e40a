"""Every named moment of trees that share a database: who passes it is killed, stopped, or fails."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from taskkit import failpoints
from tests import helpers
from tests.chaos.arming import wait_until_stopped
from tests.e2e.nodes import LEASE, Nodes, folders, kill_whole, nodes
from tests.helpers import Tree, eventually
from tests.processes import standing

#: Seconds for which a process stands still: everybody else takes it for dead by then.
STOPPED_SECONDS = LEASE + 1.5

CASES = [(point, action) for point in sorted(failpoints.SHARED) for action in failpoints.ACTIONS]

Living = tuple[Nodes, Path, list[Tree]]


@pytest.fixture(scope="module")
def living() -> Iterator[Living]:
    """Give two trees that go on, and the directory where their moments are armed."""
    helpers.linux.set_subreaper()
    with ExitStack() as stack:
        made = stack.enter_context(nodes())
        stack.enter_context(standing(made.server.pid))
        one, other, points = stack.enter_context(folders(3))
        armed = {failpoints.VARIABLE: str(points)}
        trees = [stack.enter_context(made.tree(folder, runners=2, env=armed)) for folder in (one, other)]
        yield made, points, trees


@pytest.mark.parametrize(("point", "action"), CASES)
def test_every_run_ends_once_at(living: Living, point: str, action: str) -> None:
    made, points, trees = living
    with folders(1) as (folder,):
        third = made.tree(folder, runners=2, env={failpoints.VARIABLE: str(points)})
        with contextlib.suppress(AssertionError), third:
            runs = [str(third.submit("proj.count", n=5, delay=0.1)["id"]) for _ in range(6)]
            eventually(lambda: all(made.column("node", run) for run in runs), 15, "all of them told")
            if point == "courier.claimed":
                arm(points, point, action)
                runs += made.submit(("proj.echo", {"value": point}, 10))
                recover(acted(points, point), action)
            kill_whole(third)
        if point != "courier.claimed":
            if point != "takeover.heard":
                arm(points, point, action)
                recover(acted(points, point), action)
            eventually(lambda: made.open_of(third) == 0, 4 * LEASE + 15, "takeover")
            if point == "takeover.heard":
                arm(points, point, action)
                with third:
                    recover(acted(points, point), action)
                    notes = "SELECT count(*) FROM taskkit_takeover WHERE node = %s"
                    eventually(lambda: made.query(notes, made.name(third))[0][0] == 0, 20, "its notes read")
        eventually(lambda: made.unfinished() == 0, 60, "all ends")
    made.trees.remove(third)
    made.check_ends()
    assert {made.column("status", run) for run in runs} == {"SUCCESSFUL"}
    assert all(tree.http.get("/health").text == "OK" for tree in trees)


def arm(points: Path, point: str, action: str) -> None:
    with contextlib.suppress(OSError):
        (points / f"{point}{failpoints.ACTED}").unlink()
    fresh = points / f".{point}"
    fresh.write_text(action)
    fresh.rename(points / point)


def acted(points: Path, point: str) -> int:
    """Return the process that has been hit."""
    path = points / f"{point}{failpoints.ACTED}"

    def hit() -> int:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
        return 0

    return eventually(hit, 4 * LEASE + 10, f"somebody at {point}")


def recover(hit: int, action: str) -> None:
    """Let a process that was stopped go on, when others have taken it for dead."""
    if action != "stop":
        return
    wait_until_stopped(hit)
    with contextlib.suppress(psutil.Error, AssertionError):
        eventually(lambda: not psutil.pid_exists(hit), STOPPED_SECONDS, "its end, or not")
    with contextlib.suppress(ProcessLookupError):
        os.kill(hit, signal.SIGCONT)
