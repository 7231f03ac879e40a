"""What is left when everything has stopped: the store, the projection, leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import psutil

from taskkit import linux
from tests.chaos.history import (
    History,
    StoredAttempt,
    StoredEvent,
    StoredRun,
    read_notes,
)
from tests.chaos.world import World, query

#: What may lie in the state directory of a tree that has stopped.
KNOWN_FILES: Final = frozenset({"blobs", "key", "lock", "node", "store.lock", "store.sqlite3"})


def read_store(state_dir: Path, history: History) -> None:
    """Fill in `history.stored` from the store's file."""
    path = state_dir / "store.sqlite3"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    with contextlib.closing(connection):
        attempts: dict[int, list[StoredAttempt]] = defaultdict(list)
        for row in connection.execute("SELECT * FROM attempt ORDER BY assigned_at, number"):
            attempts[row["run"]].append(_attempt(row))
        endings = {row["run"] for row in connection.execute("SELECT run FROM ending")}
        by_no: dict[int, StoredRun] = {}
        for row in connection.execute("SELECT * FROM run"):
            run = StoredRun(
                id=row["id"],
                status=row["status"],
                tail=row["tail"],
                tags=tuple(json.loads(row["tags"])),
                task=row["task"],
                endings=int(row["no"] in endings),
                error=(row["error"] or b"").decode()[:300],
                attempts=attempts[row["no"]],
            )
            by_no[row["no"]] = history.stored[run.id] = run
        for row in connection.execute('SELECT * FROM event ORDER BY run, "offset"'):
            data = row["data"] if row["blob"] is None else _blob(state_dir, row["blob"])
            digest = history.learn(row["type"], data)
            by_no[row["run"]].events.append(StoredEvent(row["offset"], row["type"], digest, row["attempt"]))


def _attempt(row: Any) -> StoredAttempt:
    cause = json.loads(row["cause"]) if row["cause"] else {}
    return StoredAttempt(
        row["number"], row["pid"], row["started_at"] is not None, row["ending"], cause.get("kind", "")
    )


def _blob(state_dir: Path, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return (state_dir / "blobs" / name).read_bytes()
    return b"the blob is missing"


def read_projection(database: Path) -> dict[str, str]:
    """Return the states of all accepted runs as Django's database has them; version 0 waits in the outbox."""
    rows = query(database, "SELECT id, status FROM taskkit_run WHERE version > 0")
    return {_dashed(str(id)): str(status) for id, status in rows}


def _dashed(id: str) -> str:
    hex = id.replace("-", "")
    return f"{hex[:8]}-{hex[8:12]}-{hex[12:16]}-{hex[16:20]}-{hex[20:]}"


def pending_outbox(database: Path) -> int:
    """Return how many committed submissions still wait in the outbox."""
    ((count,),) = query(database, "SELECT count(*) FROM taskkit_outbox WHERE state = 'pending'")
    assert isinstance(count, int)
    return count


def read_own_notes(path: Path, history: History) -> None:
    """Fill in what tasks noted about themselves."""
    history.notes = read_notes(path.read_text()) if path.exists() else []


def orphaned_blobs(state_dir: Path) -> int:
    """Return how many files in blobs/ nothing refers to."""
    path = state_dir / "store.sqlite3"
    rows = query(
        path,
        "SELECT blob FROM event WHERE blob IS NOT NULL UNION SELECT result_blob FROM run WHERE result_blob IS NOT NULL",
    )
    return len(set(os.listdir(state_dir / "blobs")) - {str(name) for (name,) in rows})


def leftovers(world: World, descriptors: set[tuple[int, str]], now: set[tuple[int, str]]) -> list[str]:
    """Return what a stopped tree has left: processes, zombies of ours, files, descriptors of this process."""
    found = []
    for mark in sorted(world.marks):
        pids = linux.processes_of_tree(mark)
        found += [f"process {pid} of tree {mark} lives: {_describe(pid)}" for pid in sorted(pids)]
    for pid in sorted(linux.children() - world.harness_children):
        found.append(f"process {pid} is left, nobody's child: {_describe(pid)}")
    files = {entry.name for entry in world.state_dir.iterdir()}
    if strange := files - KNOWN_FILES:
        found.append(f"files are left in the state directory: {', '.join(sorted(strange))}")
    # Numbers are reused; how many of a kind there are is what leaks.
    if len(now) > len(descriptors):
        found.append(f"this process has {len(now) - len(descriptors)} pipes or sockets more than before")
    return found


def _describe(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return f"{process.name()} ({process.status()}), parent {process.ppid()}"
    return "gone"
