"""Django's database away for seconds under load: nothing that does not need it notices, nothing is lost or doubled."""

from __future__ import annotations

import datetime
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.faults import Postgres
from tests.helpers import ROOT, TERMINAL, SseEvent, Tree, eventually, migrated_database

#: Seconds before, and without, the database. The acceptance line asks for 10; a folder that is moved is another kind
#: of absence, and less of it shows the same.
BEFORE, AWAY, MOVED = 4.0, 10.0, 4.0

#: Seconds between two events of each steady task, and how many of those there are.
PAUSE, STREAMS = 0.02, 3

#: Seconds between two submissions of each kind.
PACE = 0.1

#: The acceptance line: p99 while it is away, against before; below the floor a shared machine decides.
WORSE, FLOOR = 1.5, 0.050

#: Seconds for everything to be in the database when it is back: the courier tries every 5 s.
CATCH_UP = 20.0

#: Submits plain runs through the outbox until its stdin ends; prints the id of each that was committed.
SUBMITTER = """
import select, sys
import django
django.setup()
from django.db import Error, close_old_connections
from taskkit import outbox
while not select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
    try:
        print(outbox.submit("proj.echo", kwargs={"value": "outbox"}).id, flush=True)
    except Error:
        pass
    close_old_connections()
"""


@dataclass
class Place:
    """A tree beside a database that can go away.

    Attributes:
      away: keeps the database away for the length of a block.
      query: returns the rows of a statement.
    """

    tree: Tree
    away: Callable[[], AbstractContextManager[None]]
    query: Callable[[str], list[tuple[Any, ...]]]


@dataclass
class Load:
    """What clients have been told while a load was on the tree.

    Attributes:
      plain: (monotonic time of the answer, id) of accepted runs.
      outbox: ids of committed submissions.
      streams: the steady runs' events, when they have ended.
    """

    tree: Tree
    plain: list[tuple[float, str]] = field(default_factory=list)
    outbox: list[str] = field(default_factory=list)
    steady: list[str] = field(default_factory=list)
    streams: list[Future[list[SseEvent]]] = field(default_factory=list)


def follow(tree: Tree, run: str) -> list[SseEvent]:
    """Return the events of a run, all over one connection."""
    with tree.stream(run, timeout=20) as response:
        return list(response.events())


def submit_plain(load: Load, client: httpx.Client, stop: threading.Event) -> None:
    while not stop.wait(PACE):
        answer = client.post("/api/v1/runs", json={"task": "proj.echo", "kwargs": {"value": "plain"}})
        assert answer.status_code == 202, answer.text
        load.plain.append((time.monotonic(), answer.json()["id"]))


@contextmanager
def loaded(tree: Tree, seconds: float) -> Iterator[Load]:
    """Keep a load on the tree: steady streams for `seconds`, plain runs and outbox runs for the block."""
    load, stop = Load(tree), threading.Event()
    environment = tree.environment() | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"}
    submitter = subprocess.Popen(
        [sys.executable, "-c", SUBMITTER, str(PACE)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with ThreadPoolExecutor(STREAMS + 1) as threads:
        for _ in range(STREAMS):
            run = tree.submit("proj.count", n=int(seconds / PAUSE), delay=PAUSE)["id"]
            load.steady.append(run)
            load.streams.append(threads.submit(follow, tree, run))
        submitting = threads.submit(submit_plain, load, tree.client(), stop)
        try:
            yield load
        finally:
            stop.set()
            out, _ = submitter.communicate(timeout=30)
        load.outbox += out.split()
        submitting.result(timeout=20)
        for stream in load.streams:
            stream.result(timeout=seconds + 20)


def delays(events: list[SseEvent], begin: float, end: float) -> list[float]:
    """Return the seconds from `emit` to the client of each event of the task that was emitted between two times."""
    offset = time.time() - time.monotonic()
    found = []
    for event in events:
        if event.type == "progress":
            at = datetime.datetime.fromisoformat(event.json["_timestamp"]).timestamp() - offset
            if begin <= at < end:
                found.append(event.at - at)
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


# --- databases that go away


@contextmanager
def _sqlite_tree(state_dir: Path) -> Iterator[tuple[Tree, Path]]:
    folder = state_dir / "db"
    folder.mkdir()
    database = folder / "project.sqlite3"
    shutil.copyfile(migrated_database(), database)
    with Tree(state_dir, env={"BULKHEAD_TEST_DB": str(database)}, runners=6) as tree:
        tree.database = database
        yield tree, database


def _query_sqlite(database: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        return connection.execute(statement).fetchall()


@contextmanager
def locked_sqlite(state_dir: Path) -> Iterator[Place]:
    """A SQLite file that another process keeps locked."""
    with _sqlite_tree(state_dir) as (tree, database):

        @contextmanager
        def away() -> Iterator[None]:
            with closing(sqlite3.connect(database, isolation_level=None, timeout=30)) as other:
                other.execute("BEGIN EXCLUSIVE")
                yield

        yield Place(tree, away, lambda statement: _query_sqlite(database, statement))


@contextmanager
def moved_sqlite(state_dir: Path) -> Iterator[Place]:
    """A SQLite file whose folder is moved away: who has it open could go on writing."""
    with _sqlite_tree(state_dir) as (tree, database):

        @contextmanager
        def away() -> Iterator[None]:
            elsewhere = state_dir / "elsewhere"
            database.parent.rename(elsewhere)
            yield
            elsewhere.rename(database.parent)

        yield Place(tree, away, lambda statement: _query_sqlite(database, statement))


@contextmanager
def stopped_postgres(state_dir: Path) -> Iterator[Place]:
    """A PostgreSQL server that is stopped at once, and started again."""
    with Postgres() as server:
        server.migrate()

        @contextmanager
        def away() -> Iterator[None]:
            server.stop()
            yield
            server.start()

        def query(statement: str) -> list[tuple[Any, ...]]:
            with psycopg.connect(f"host={server.folder} user=bulkhead dbname=bulkhead") as connection:
                return connection.execute(statement).fetchall()

        with Tree(state_dir, env=server.environment(), runners=6) as tree:
            yield Place(tree, away, query)


PLACES = [(locked_sqlite, AWAY), (moved_sqlite, MOVED), (stopped_postgres, AWAY)]


# --- the test


def submit_rows(client: httpx.Client, until: float) -> dict[str, dict[str, Any]]:
    """Submit model tasks until a time; return the body of each by the id to repeat it with."""
    refused = {}
    while time.monotonic() < until:
        body = {"task": "proj.Row", "fields": {"message": f"row {len(refused)}"}}
        asked = time.monotonic()
        answer = client.post("/api/v1/runs", json=body, timeout=20)
        assert time.monotonic() - asked < 8, "an answer comes in time"
        problem = answer.json()
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), (
            problem
        )
        assert int(answer.headers["retry-after"]) >= 1
        refused[problem["run"]] = body
        time.sleep(PACE)
    return refused


def submit_again(client: httpx.Client, run: str, body: dict[str, Any]) -> None:
    """Send the same submission with the id of the 503 until it is accepted, twice."""

    def accepted() -> httpx.Response | None:
        answer = client.post("/api/v1/runs", json={**body, "id": run}, timeout=20)
        assert answer.status_code in (200, 202, 503), answer.text
        return None if answer.status_code == 503 else answer

    for _ in range(2):
        assert eventually(accepted, CATCH_UP, f"the row of {run}").json()["id"] == run


@pytest.mark.alone
@pytest.mark.parametrize(("place", "seconds"), PLACES, ids=[place.__name__ for place, _ in PLACES])
def test_the_database_is_away(
    place: Callable[[Path], AbstractContextManager[Place]],
    seconds: float,
    tmp_state_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with place(tmp_state_dir) as here:
        tree, client = here.tree, here.tree.client()
        courier = tree.child("courier").pid
        with loaded(tree, BEFORE + seconds + 2) as load:
            begin = time.monotonic()
            time.sleep(BEFORE)
            with here.away():
                gone = time.monotonic()
                rows = submit_rows(client, gone + seconds)
                finished = [run for at, run in load.plain if gone <= at < gone + seconds - 2]
                states = {run: tree.snapshot(run)["status"] for run in finished}
            back = time.monotonic()
            for run, body in rows.items():
                submit_again(client, run, body)
        check_streams(load, begin, gone, back, place.__name__, capsys)
        assert len(finished) > (seconds - 2) / PACE / 4, "plain runs were accepted all the time"
        assert set(states.values()) == {"SUCCESSFUL"}, "and finished"
        check_projections(here, load, rows)
        assert tree.child("courier").pid == courier, "an absent database is no reason to replace the courier"


def check_streams(
    load: Load, begin: float, gone: float, back: float, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = [stream.result() for stream in load.streams]
    for events in streams:
        assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
        assert events[-1].type == "stream.end"
    before = [delay for events in streams for delay in delays(events, begin, gone)]
    during = [delay for events in streams for delay in delays(events, gone, back)]
    figures = (
        f"p99 from emit to client {p99(before) * 1000:.1f} ms before (n = {len(before)}), "
        f"{p99(during) * 1000:.1f} ms while away (n = {len(during)}, {back - gone:.1f} s)"
    )
    with capsys.disabled():
        print(f"\nRECORD database away, {name}: {figures}")
    assert p99(during) <= max(WORSE * p99(before), FLOOR), figures


def check_projections(here: Place, load: Load, rows: dict[str, dict[str, Any]]) -> None:
    """Everything that was acknowledged is in the database, once, and nothing else of it."""
    known = {run for _, run in load.plain} | set(load.outbox) | set(load.steady) | set(rows)
    assert load.outbox
    assert rows

    def projected() -> bool:
        found = {str(id): status for id, status in here.query("SELECT id, status FROM taskkit_run")}
        canonical = {str(id).replace("-", ""): status for id, status in found.items()}
        missing = [run for run in known if canonical.get(run.replace("-", "")) != "SUCCESSFUL"]
        return not missing and set(canonical.values()) <= set(TERMINAL)

    eventually(projected, CATCH_UP, "every run in the database")
    eventually(lambda: not here.query("SELECT id FROM taskkit_outbox"), CATCH_UP, "an empty outbox")
    for run in [*load.outbox, *rows]:
        snapshot = here.tree.snapshot(run)
        assert (snapshot["status"], len(snapshot["attempts"])) == ("SUCCESSFUL", 1), snapshot
    messages = sorted(message for (message,) in here.query("SELECT message FROM proj_row"))
    assert messages == sorted(body["fields"]["message"] for body in rows.values()), "one row each"
    runs = here.query("SELECT count(*) FROM taskkit_run WHERE row_key IS NOT NULL")
    assert runs == [(len(rows),)], "and one run"


def test_a_server_that_hangs_holds_up_nothing_but_itself(tmp_state_dir: Path) -> None:
    """Its processes are stopped: connections stay open and nothing answers. The courier gives up, and beats."""
    with Postgres() as server:
        server.migrate()
        with Tree(tmp_state_dir, env=server.environment()) as tree:
            courier = tree.child("courier").pid
            server.freeze()
            try:
                run = tree.submit("proj.echo", value=1)["id"]
                assert tree.wait(run)["status"] == "SUCCESSFUL"
                answer = tree.http.post(
                    "/api/v1/runs", json={"task": "proj.Row", "fields": {"message": "x"}}, timeout=20
                )
                assert (answer.status_code, bool(answer.headers["retry-after"])) == (503, True)
                eventually(lambda: "does not answer" in tree.tail(), 40, "the courier gives it up")
            finally:
                server.thaw()

            def status() -> Any:
                with psycopg.connect(f"host={server.folder} user=bulkhead dbname=bulkhead") as connection:
                    return connection.execute(
                        "SELECT status FROM taskkit_run WHERE id = %s", (run,)
                    ).fetchone()

            eventually(lambda: status() == ("SUCCESSFUL",), 40, "the projection")
            assert tree.child("courier").pid == courier


def test_a_wiped_store_leaves_no_row_open(tmp_state_dir: Path) -> None:
    """What ran is gone with its store; Django learns of it, so that a task row can be started again."""
    with _sqlite_tree(tmp_state_dir) as (tree, database):
        body = {"task": "proj.ARow", "fields": {"message": "x", "steps": 1, "pause": 60}}
        lost = tree.http.post("/api/v1/runs", json=body).json()["id"]

        def row() -> tuple[Any, ...]:
            found = _query_sqlite(database, "SELECT id, status, row_key FROM taskkit_run")
            return next(row for row in found if row[0] == lost.replace("-", ""))

        eventually(lambda: row()[1] == "RUNNING", 10, "the projection of a run at work")
        # Until then, the run would be made again of its outbox entry.
        eventually(
            lambda: not _query_sqlite(database, "SELECT id FROM taskkit_outbox"), 10, "an empty outbox"
        )
        tree.process.kill()
        tree.process.wait()
        for path in tmp_state_dir.glob("store.sqlite3*"):
            path.unlink()
        with closing(sqlite3.connect(database, timeout=10)) as other, other:  # it was long ago
            other.execute("UPDATE taskkit_run SET created_at = '2026-01-01 00:00:00'")
        tree.start()
        eventually(lambda: row()[1] == "FAILED", 30, "the end of what no store knows")
        script = "from tests.project.models import ARow; import taskkit; print(taskkit.submit(ARow.objects.get()).new)"
        again = subprocess.run(
            [sys.executable, "-c", f"import django; django.setup(); {script}"],
            cwd=ROOT,
            env=tree.environment() | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert again.stdout == "True\n", again.stderr
