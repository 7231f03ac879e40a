"""Connections to the project's database: streams hold none, waiting runners hold none, forks share none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from tests.faults import Postgres
from tests.helpers import Tree, eventually

#: Open streams, of one run.
STREAMS = 50

#: Seconds for what takes milliseconds, on a machine that others keep busy.
SOON = 20.0

#: The courier's: one that it asks by, on PostgreSQL one more that hears NOTIFY.
COURIER = 2

POOLS = {
    "default": {"runners": 4},
    "reused": {"runners": 2, "runs": 100},
    "shared": {"runners": 1, "runs": 100, "concurrency": 4},
}


@dataclass
class Place:
    """A tree beside a database; `held` counts the connections that its processes have."""

    tree: Tree
    held: Callable[[], int]


@contextlib.contextmanager
def on_postgres() -> Iterator[Place]:
    with Postgres() as server:
        server.migrate()
        with (
            Tree(env=server.environment() | {"TASKKIT_POOLS": json.dumps(POOLS)}) as tree,
            psycopg.connect(
                host=str(server.folder), user="bulkhead", dbname="bulkhead", autocommit=True
            ) as own,
        ):
            sql = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = 'bulkhead' AND pid <> pg_backend_pid()"
            )
            yield Place(tree, lambda: int(own.execute(sql).fetchall()[0][0]))
        assert "unexpected EOF" not in (server.folder / "log").read_text(), "each was closed, none was left"


@contextlib.contextmanager
def on_sqlite() -> Iterator[Place]:
    with Tree(env={"TASKKIT_POOLS": json.dumps(POOLS)}) as tree:
        yield Place(tree, lambda: sum(_has_open(process, tree.database) for process in tree.children()))


def _has_open(process: psutil.Process, file: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(one.path) == file for one in process.open_files())
    return False


def perform(tree: Tree, **submission: Any) -> Any:
    """Submit a run; return its result."""
    answer = tree.http.post("/api/v1/runs", json=submission)
    assert answer.status_code == 202, answer.text
    ended = tree.wait(answer.json()["id"], timeout=SOON)
    assert ended["status"] == "SUCCESSFUL", ended
    return ended["result"]


@pytest.mark.parametrize("database", [on_sqlite, on_postgres], ids=["sqlite", "postgresql"])
def test_neither_streams_nor_waiting_runners_hold_one(
    database: Callable[[], contextlib.AbstractContextManager[Place]], tmp_path: Path
) -> None:
    with database() as place, contextlib.ExitStack() as streams:
        tree = place.tree
        watched = tree.submit("proj.patient", seconds=300)["id"]
        for _ in range(STREAMS):
            assert streams.enter_context(tree.stream(watched, timeout=SOON)).status == 200
        eventually(lambda: tree.snapshot(watched)["subscribers"] == STREAMS, SOON)

        gate = tmp_path / "gate"
        holding = [
            tree.http.post(
                "/api/v1/runs", json={"task": "proj.ask_rows", "pool": pool, "kwargs": {"gate": str(gate)}}
            ).json()["id"]
            for pool in ("default", "reused")
        ]
        eventually(lambda: place.held() >= 2, SOON, "the connections of tasks that ask")
        gate.touch()
        for run in holding:
            assert tree.wait(run, timeout=SOON)["result"] == 0
        for pool in POOLS:
            assert perform(tree, task="proj.ask_rows_async", pool=pool) == 0
            # A row of a task: saved by intake, read and completed by a runner, in a thread beside its loop.
            assert perform(tree, task="proj.ARow", pool=pool, fields={"message": "here"}) == "here"
        assert perform(tree, task="proj.ask_rows", pool="reused") == 0

        eventually(lambda: place.held() <= COURIER, SOON, "connections of processes that wait")
        assert tree.snapshot(watched)["subscribers"] == STREAMS
        tree.http.post(f"/api/v1/runs/{watched}/cancel", json={})
        tree.wait(watched, timeout=SOON)
