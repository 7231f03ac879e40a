"""From Django and back: rows that any process inserts become runs, what became of them is in the database."""

from __future__ import annotations

import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, Tree, eventually, migrated_database

#: Seconds within which a submission from Django is a run: told by a poke, or found by the courier's polling once
#: a second.
POKED, POLLED = 1.0, 3.0

#: Of pokes, the median has to be well below the polling's mean of half a second; otherwise none arrived.
POKED_MEDIAN = 0.25

PRELUDE = """
import json, sys, time
import django
django.setup()
from django.db import transaction
from taskkit import coordinator, outbox
from taskkit.models import Node, Outbox, Run
from tests.project.models import ARow, BadRow, Row
arguments = json.loads(sys.argv[1])

def answer(value):
    print(json.dumps(value, default=str))

def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)

def timed(**options):
    started = time.monotonic()
    handle = outbox.submit("proj.echo", kwargs={"value": 1}, **options)
    until(lambda: handle.run().version > 0)
    return time.monotonic() - started
"""


def django(tree: Tree, script: str, *arguments: Any) -> Any:
    """Run `script` in a Django process of its own, which shares nothing with the tree but the database.

    Returns what it gave to `answer`.
    """
    finished = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, json.dumps(arguments)],
        cwd=ROOT,
        env=tree.environment() | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stderr}\n{tree.tail()}"
    return json.loads(finished.stdout.splitlines()[-1])


def query(tree: Tree, statement: str, *parameters: Any) -> list[dict[str, Any]]:
    """Return rows of the project's database, read without Django."""
    with closing(sqlite3.connect(f"file:{tree.database}?mode=ro", uri=True, timeout=5)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(statement, parameters)]


def projection(tree: Tree, run: str) -> dict[str, Any]:
    """Return the Run row once it says that the run has ended."""

    def ended() -> dict[str, Any] | None:
        # A run that was submitted over HTTP gets its row when the courier is told of it.
        rows = query(tree, "SELECT * FROM taskkit_run WHERE id = ?", run.replace("-", ""))
        return rows[0] if rows and rows[0]["finished_at"] else None

    return eventually(ended, 10, f"the end of {run} in Django's database")


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=4) as tree:
        # The courier has registered where to poke it; what comes earlier is found by polling.
        eventually(lambda: query(tree, "SELECT * FROM taskkit_node"), 10, "the node's row")
        yield tree


# -- submissions


def test_a_submission_from_django_runs_and_its_projection_follows(tree: Tree) -> None:
    run = django(tree, "answer(outbox.submit('proj.add', kwargs={'a': 2, 'b': 3}, tags=['mine']).id)")
    row = projection(tree, run)
    assert row["status"] == "SUCCESSFUL"
    assert json.loads(row["result"]) == 5
    assert row["attempt"] == 1
    assert json.loads(row["tags"]) == ["mine"]
    assert row["created_at"] <= row["started_at"] <= row["finished_at"]
    snapshot = tree.snapshot(run)
    assert (snapshot["status"], snapshot["result"], snapshot["tags"]) == ("SUCCESSFUL", 5, ["mine"])
    assert [event.type for event in tree.events(run)] == ["run.started", "stream.end"]
    assert query(tree, "SELECT * FROM taskkit_outbox") == []


def test_a_poke_makes_it_quick(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    took = django(tree, "answer([timed() for _ in range(15)])")
    with capsys.disabled():
        print(f"\nRECORD ms from outbox.submit to accepted: {show(took)}")
    assert max(took) < POKED, took
    assert statistics.median(took) < POKED_MEDIAN, took


def show(seconds: list[float]) -> str:
    return (
        f"median {statistics.median(seconds) * 1000:.0f}, slowest {max(seconds) * 1000:.0f} of {len(seconds)}"
    )


def test_without_a_node_to_poke_polling_finds_it(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    took = django(tree, "Node.objects.all().delete(); answer([timed() for _ in range(3)])")
    with capsys.disabled():
        print(f"\nRECORD ms from outbox.submit to accepted, without a poke: {show(took)}")
    assert max(took) < POLLED, took


def test_a_poke_that_goes_nowhere_is_made_up_for_by_polling(tree: Tree, tmp_path: Path) -> None:
    # A node that is gone: its socket's file is there no more, or nobody listens.
    script = """
from django.utils import timezone
Node.objects.create(name="gone", poke_address=arguments[0], pid=1, seen_at=timezone.now())
answer([timed() for _ in range(2)])
Node.objects.filter(name="gone").delete()
"""
    assert max(django(tree, script, str(tmp_path / "nobody.sock"))) < POLLED


def test_what_is_rolled_back_never_runs(tree: Tree) -> None:
    script = """
class Undo(Exception):
    pass

try:
    with transaction.atomic():
        undone = outbox.submit("proj.echo").id
        row = Row.objects.create(message="undone")
        started = coordinator.start_task_sync(row).id
        raise Undo
except Undo:
    pass
with transaction.atomic():
    kept = outbox.submit("proj.echo").id
answer([undone, started, kept])
"""
    undone, started, kept = django(tree, script)
    assert projection(tree, kept)["status"] == "SUCCESSFUL"
    for run in (undone, started):  # submitted before `kept`, so they would have been taken before it
        assert tree.http.get(f"/api/v1/runs/{run}").status_code == 404
        assert query(tree, "SELECT * FROM taskkit_run WHERE id = ?", run.replace("-", "")) == []
    assert query(tree, "SELECT * FROM proj_row WHERE message = 'undone'") == []


def test_many_processes_submit_at_once_and_each_runs_once(tree: Tree) -> None:
    script = "answer([outbox.submit('proj.echo', kwargs={'value': n}).id for n in range(20)])"
    with ThreadPoolExecutor(3) as processes:
        runs = [run for found in processes.map(lambda _: django(tree, script), range(3)) for run in found]
    assert len(set(runs)) == 60
    for run in runs:
        row = projection(tree, run)
        assert (row["status"], row["attempt"]) == ("SUCCESSFUL", 1)


def test_a_submission_that_names_no_task_is_refused_at_the_call(tree: Tree) -> None:
    script = """
from taskkit.errors import UnknownTask
try:
    outbox.submit("proj.nonsense")
except UnknownTask as error:
    answer(str(error))
"""
    assert "proj.nonsense" in django(tree, script)


def test_a_submission_that_the_gateway_refuses_is_seen_in_django(tree: Tree) -> None:
    run = django(tree, "answer(outbox.submit('proj.echo', kwargs={'value': 1}, pool='nowhere').id)")
    row = projection(tree, run)
    assert row["status"] == "FAILED"
    assert "nowhere" in row["error"]


def test_a_run_that_raises_has_its_error_in_django(tree: Tree) -> None:
    row = projection(tree, django(tree, "answer(outbox.submit('proj.boom', kwargs={'message': 'ouch'}).id)"))
    error = json.loads(row["error"])
    assert (row["status"], error["code"], error["message"]) == ("FAILED", "raised", "ouch")
    assert error["exception"] == "builtins.ValueError"


def test_what_was_submitted_while_no_tree_ran_runs_at_its_start(tmp_state_dir: Path) -> None:
    tree = Tree(tmp_state_dir, runners=2)
    shutil.copyfile(migrated_database(), tree.database)
    run = django(tree, "answer(outbox.submit('proj.echo', kwargs={'value': 'late'}).id)")
    with tree:
        assert json.loads(projection(tree, run)["result"]) == "late"


# -- task rows


def test_a_started_row_is_completed(tree: Tree) -> None:
    script = """
row = ARow.objects.create(message="hello", steps=2)
answer([row.pk, coordinator.start_task_sync(row).id])
"""
    pk, run = django(tree, script)
    assert projection(tree, run)["status"] == "SUCCESSFUL"
    (row,) = query(tree, "SELECT * FROM proj_arow WHERE id = ?", pk)
    assert row["completed_at"] is not None
    assert json.loads(row["final_value"]) == "hello"
    events = tree.events(run)
    assert [e.type for e in events] == [
        *("run.started", "start", "progress", "progress", "complete", "stream.end")
    ]
    assert {e.json["_task_id"] for e in events[1:-1]} == {pk}
    assert {(e.json["_app"], e.json["_model"]) for e in events[1:-1]} == {("proj", "ARow")}


def test_starting_a_running_row_twice_is_the_same_run(tree: Tree) -> None:
    first_process = """
row = ARow.objects.create(message="long", steps=100, pause=0.05)
first = coordinator.start_task_sync(row)
at_once = coordinator.start_task_sync(row)
until(lambda: first.run().status == "RUNNING")
again = coordinator.start_task_sync(row, "proj", "ARow")
running = coordinator.is_task_running("ARow", row.pk)
answer([row.pk, [first.id, at_once.id, again.id], [first.new, at_once.new, again.new], running])
"""
    pk, runs, new, running = django(tree, first_process)
    assert len(set(runs)) == 1
    assert new == [True, False, False]
    assert running is True
    second_process = "answer(coordinator.start_task_sync(ARow.objects.get(pk=arguments[0])).id)"
    assert django(tree, second_process, pk) == runs[0]
    assert tree.http.post(f"/api/v1/runs/{runs[0]}/cancel", json={}).status_code == 202
    assert projection(tree, runs[0])["status"] == "CANCELLED"
    assert django(tree, "answer(coordinator.is_task_running('proj', 'arow', arguments[0]))", pk) is False
    key = projection(tree, runs[0])["row_key"]
    assert len(query(tree, "SELECT id FROM taskkit_run WHERE row_key = ?", key)) == 1


def test_a_coroutine_starts_a_row_as_well(tree: Tree) -> None:
    script = """
import asyncio

async def main():
    row = await ARow.objects.acreate(message="async", steps=1)
    handle = await coordinator.start_task(row)
    found = await coordinator.get_task_instance("proj", "ARow", row.pk)
    return [handle.id, found.message]

answer(asyncio.run(main()))
"""
    run, message = django(tree, script)
    assert message == "async"
    assert projection(tree, run)["status"] == "SUCCESSFUL"


# -- task rows over HTTP


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "message"),
        ({"message": "x" * 101}, "message"),
        ({"message": 5}, "message"),
        ({"message": "m", "steps": "many"}, "steps"),
        ({"message": "m", "steps": -1}, "steps"),
        ({"message": "m", "final_value": 1}, "final_value"),
        ({"message": "m", "id": 1}, "id"),
        ({"message": ""}, "message"),
    ],
)
def test_invalid_fields_are_422_by_name_and_save_nothing(
    tree: Tree, fields: dict[str, Any], name: str
) -> None:
    before = query(tree, "SELECT count(*) AS n FROM proj_row")
    response = tree.http.post("/api/v1/runs", json={"task": "proj.Row", "fields": fields})
    assert response.status_code == 422, response.text
    assert list(response.json()["errors"]) == [name]
    assert query(tree, "SELECT count(*) AS n FROM proj_row") == before


def test_a_valid_row_is_saved_run_and_completed(tree: Tree) -> None:
    fields = {"message": "over HTTP", "steps": 2}
    response = tree.http.post("/api/v1/runs", json={"task": "proj.Row", "fields": fields})
    assert response.status_code == 202, response.text
    run = response.json()["id"]
    assert projection(tree, run)["status"] == "SUCCESSFUL"
    (row,) = query(tree, "SELECT * FROM proj_row WHERE message = 'over HTTP'")
    assert row["steps"] == 2
    assert row["completed_at"] is not None
    assert json.loads(row["final_value"]) == "over HTTP"
    assert {e.json["_task_id"] for e in tree.events(run) if e.type == "progress"} == {row["id"]}


def test_a_repeated_submission_of_a_row_saves_one(tree: Tree) -> None:
    body = {"task": "proj.Row", "fields": {"message": "once"}}
    answers = [
        tree.http.post("/api/v1/runs", json=body, headers={"Idempotency-Key": "once"}) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [202, 200]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(query(tree, "SELECT id FROM proj_row WHERE message = 'once'")) == 1


def test_a_row_that_raises_is_not_completed(tree: Tree) -> None:
    response = tree.http.post("/api/v1/runs", json={"task": "proj.BadRow", "fields": {}})
    assert response.status_code == 202, response.text
    row = projection(tree, response.json()["id"])
    assert row["status"] == "FAILED"
    assert all(bad["completed_at"] is None for bad in query(tree, "SELECT * FROM proj_badrow"))
