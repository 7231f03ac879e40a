"""The machine loses power under open runs: an old cursor hears of it, and is never led past a gap."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from taskkit.client import close_clients, get_client
from tests.helpers import SseEvent, Tree, collect, eventually, raw_get, wait_until_gone

#: A frame of the WAL: a page with its header (sqlite.org/fileformat2.html, 4.1).
FRAME = 4096 + 24


def read_until(tree: Tree, run: str, events: int) -> list[SseEvent]:
    """Follow a run until it has said so many events."""
    found: list[SseEvent] = []
    with tree.stream(run) as stream:
        for event in stream.events():
            found.append(event)
            if len(found) >= events:
                return found
    raise AssertionError(f"it ended behind {found[-1]}")


def position_of(tree: Tree, run: str, event: SseEvent) -> str:
    """Return the position of an event in the store, its id on a stream of many runs."""
    url = f"{tree.url}/api/v1/events?run={run}"
    with raw_get(url, token=tree.token()) as response:
        return next(same.id for same in response.events() if same.data == event.data)


def pull_the_plug(tree: Tree) -> None:
    """End every process at once; nobody gets to write another byte."""
    everybody = {psutil.Process(tree.pid), *psutil.Process(tree.pid).children(recursive=True)}
    tree.children()  # so that the tree knows what to look for at its end
    for process in everybody:  # stopped first: none sees another's death
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP)
    for process in everybody:
        with contextlib.suppress(psutil.Error):
            process.kill()
    tree.process.wait()
    assert not wait_until_gone(everybody - {psutil.Process(os.getpid())}, 5.0)


def lose_rows(store: Path, seen: int) -> None:
    """Take the newest events out, as if their transactions had never reached the disk."""
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        ((run,),) = connection.execute("SELECT no FROM run WHERE status = 'RUNNING'").fetchall()
        connection.execute('DELETE FROM event WHERE run = ? AND "offset" > ?', (run, seen - 6))
        connection.execute("UPDATE run SET tail = ? WHERE no = ?", (seen - 6, run))
        connection.execute(
            "UPDATE sqlite_sequence SET seq = (SELECT max(pos) FROM event) WHERE name = 'event'"
        )


def lose_frames(store: Path, seen: int) -> None:
    """Cut the WAL off, in the middle of a frame, where no transaction has waited for the disk."""
    wal = store.with_name(store.name + "-wal")
    store.with_name(store.name + "-shm").unlink()
    left = wal.stat().st_size
    while newest_of(store, wal, left) >= seen:
        left -= 40 * FRAME + 100
        assert left > 60 * FRAME
    os.truncate(wal, left)


def newest_of(store: Path, wal: Path, size: int) -> int:
    """Return the newest offset of the open run in a copy of the store, with so many bytes of its WAL."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(store, folder))
        copy.with_name(wal.name).write_bytes(wal.read_bytes()[:size])
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            ((tail,),) = connection.execute("SELECT tail FROM run WHERE status = 'RUNNING'").fetchall()
    return int(tail)


def boot_anew(store: Path) -> int:
    """Write another boot id; return the newest offset that is left of the one open run."""
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        ((tail, newest),) = connection.execute(
            """SELECT tail, (SELECT max("offset") FROM event WHERE event.run = no) FROM run
                WHERE status = 'RUNNING'"""
        ).fetchall()
        assert tail == newest, "a transaction survives whole, or not at all"
        connection.execute("UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    return int(tail)


@pytest.mark.parametrize("lose", [lose_rows, lose_frames])
def test_a_power_cut_is_a_reset_for_those_who_saw_more(
    tmp_path: Path, lose: Callable[[Path, int], None]
) -> None:
    store = tmp_path / "store.sqlite3"
    with contextlib.ExitStack() as trees:
        tree = Tree(tmp_path)
        tree.start()
        trees.callback(tree._clean_up)
        done = tree.submit("proj.echo", value=1)["id"]
        tree.wait(done)
        run = tree.submit("proj.count", n=60, delay=0.02)["id"]
        seen = read_until(tree, run, 40)
        position = position_of(tree, run, seen[-1])
        pull_the_plug(tree)
        lose(store, int(seen[-1].id))
        left = boot_anew(store)
        assert left < int(seen[-1].id), "the client saw more than the store has now"

        again = trees.enter_context(Tree(tmp_path))
        url, token = f"{again.url}/api/v1/runs/{run}/events", again.token()
        events = collect(url, token, after=seen[-1].id)
        mixed = f"{again.url}/api/v1/events?run={run}&until=done"
        with raw_get(mixed, token=token, headers={"Last-Event-ID": position}) as response:
            reset, *rest = response.events()
        assert (reset.id, reset.json) == ("0", {"from": 1, "reason": "epoch"})
        assert [event.data for event in rest] == [event.data for event in events[1:]]
        assert int(rest[-1].id) > int(position), "no position is given out twice"
        assert (events[0].type, events[0].id) == ("stream.reset", "e1-0")
        assert events[0].json == {"from": 1, "reason": "epoch"}
        assert [event.id for event in events[1:]] == [f"e1-{n}" for n in range(1, len(events))]
        assert events[-1].type == "stream.end"
        assert "run.retrying" in {event.type for event in events}, "its runner is gone; the run began again"

        # in the middle of the new epoch, and at its end
        assert [event.id for event in collect(url, token, after=events[-3].id)] == [
            events[-2].id,
            events[-1].id,
        ]
        headers = {"Accept": "text/event-stream", "Last-Event-ID": events[-1].id}
        with raw_get(url, token=token, headers=headers) as response:
            assert response.status == 204
        # the client of the house takes ids as they come
        trees.callback(close_clients)
        followed = list(get_client(again.url, token=token).follow(run, after=seen[-1].id))
        assert [event.id for event in followed] == [event.id for event in events]
        # what had ended before was on the disk, and has no epoch
        assert [event.id for event in again.events(done)] == ["1", "2"]


def test_the_same_boot_needs_no_epoch(tmp_path: Path) -> None:
    with contextlib.ExitStack() as trees:
        tree = Tree(tmp_path)
        tree.start()
        trees.callback(tree._clean_up)
        run = tree.submit("proj.count", n=30, delay=0.02)["id"]
        seen = read_until(tree, run, 10)
        pull_the_plug(tree)
        again = trees.enter_context(Tree(tmp_path))
        events = collect(f"{again.url}/api/v1/runs/{run}/events", again.token(), after=seen[-1].id)
        first = int(seen[-1].id) + 1
        assert [event.id for event in events] == [str(n) for n in range(first, first + len(events))]
        assert eventually(lambda: again.snapshot(run)["status"] == "SUCCESSFUL")
