"""A project that uses Django's own Tasks interface, with Bulkhead as its backend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.helpers import ROOT, Tree, eventually
from tests.interface.package import PACKAGE

#: What each script of a "web process" begins with. `done` waits for an end as any user of the interface would.
HEAD = """
import asyncio, json, sys, time
from dataclasses import replace
import django; django.setup()
from django.db import transaction
from django.utils import timezone
from datetime import timedelta
from tests.interface.package import TaskResultStatus, task_backends
from tests.interface import orders, tasks
def done(result, seconds=20.0):
    end = time.monotonic() + seconds
    while not result.is_finished:
        assert time.monotonic() < end, result
        time.sleep(0.02)
        result.refresh()
    return result
def show(value):
    print(json.dumps(value, default=str))
"""


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heard") / "signals"


@pytest.fixture(scope="module")
def tree(heard: Path) -> Iterator[Tree]:
    with Tree(settings="tests.interface.settings", env={"SHOP_HEARD": str(heard)}) as tree:
        yield tree


def web(tree: Tree, script: str, **env: str) -> Any:
    """Run a script as a process of the site; return what it showed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", HEAD + dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=tree.environment() | {"DJANGO_SETTINGS_MODULE": "tests.interface.settings", **env},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout)


def test_a_page_enqueues_and_another_process_gets_the_result(tree: Tree) -> None:
    id = web(tree, "from django.test import Client; show(Client().get('/buy').content.decode())")
    found = web(
        tree,
        f"""
        result = done(orders.confirm.get_result({id!r}))
        show([result.return_value, result.args, result.kwargs, result.attempts, len(result.worker_ids),
              result.task.queue_name, result.errors, result.backend,
              result.enqueued_at <= result.started_at <= result.finished_at,
              result.last_attempted_at == result.started_at, str(result.status)])
        """,
    )
    returned, *rest = found
    assert (returned["order"], returned["to"]) == (7, "someone@example.org")
    assert rest == [[7], {"to": "someone@example.org"}, 1, 1, "mail", [], "default", True, True, "SUCCESSFUL"]
    assert tree.snapshot(id)["task"] == "shop.confirm"


def test_a_large_result_comes_back_whole_from_any_process(tree: Tree) -> None:
    ids = web(tree, "show([orders.archive.enqueue(size).id for size in (3_000_000, 5_000_000, 100_000)])")
    script = f"""
    from taskkit.models import Run
    results = [done(orders.archive.get_result(id)) for id in {ids!r}]
    rows = [Run.objects.get(id=r.id).result == r.return_value for r in results]
    show([[len(r.return_value), set(r.return_value) == {{"é" * 1000}}] for r in results] + [all(rows)])
    """
    assert web(tree, script) == [[1500, True], [2500, True], [50, True], True]


def test_async_tasks_and_async_callers(tree: Tree) -> None:
    script = """
    async def main():
        result = await orders.later.aenqueue({"a": [1, 2.5, None]})
        while not result.is_finished:
            await asyncio.sleep(0.02)
            await result.arefresh()
        same = await orders.later.aget_result(result.id)
        return [result.return_value, same == result]
    show(asyncio.run(main()))
    """
    assert web(tree, script) == [{"a": [1, 2.5, None]}, True]


def test_the_context(tree: Tree) -> None:
    found = web(
        tree, "r = done(orders.contextual.using(priority=9).enqueue(word='y')); show([r.id, r.return_value])"
    )
    id, said = found
    worker = said.pop("workers")
    assert said == {
        "attempt": 1,
        "id": id,
        "args": [],
        "kwargs": {"word": "y"},
        "status": "RUNNING",
        "word": "y",
    }
    assert len(worker) == 1
    assert worker[0]


def test_what_it_says_is_a_stream(tree: Tree) -> None:
    id = web(tree, "show(orders.speak.enqueue(['to', 'be']).id)")
    events = tree.events(id)
    assert [event.type for event in events] == [
        "run.started",
        "word",
        "run.progress",
        "word",
        "run.progress",
        "stream.end",
    ]


def test_failures_have_importable_classes(tree: Tree) -> None:
    script = """
    results = [done(it) for it in [orders.fail.enqueue("no"), orders.die.enqueue(), tasks.endless.enqueue()]]
    show([[str(r.status), r.errors[0].exception_class_path, r.errors[0].exception_class.__name__, r.errors[0].traceback]
          for r in results])
    """
    raised, crashed, late = web(tree, script)
    assert raised[:3] == ["FAILED", "builtins.LookupError", "LookupError"]
    assert "LookupError: no" in raised[3]
    assert "orders.py" in raised[3]
    assert crashed[:3] == ["FAILED", "taskkit.errors.RunnerCrashed", "RunnerCrashed"]
    assert "SIGSEGV" in crashed[3]
    assert late[:3] == ["FAILED", "taskkit.errors.TaskTimeout", "TaskTimeout"]


def test_attempts_backoff_metadata(tree: Tree) -> None:
    script = """
    good = done(tasks.flaky.using(metadata={"colour": "blue"}).enqueue(3))
    bad = done(tasks.flaky.enqueue(9))
    show([good.return_value, good.attempts, [e.exception_class_path for e in good.errors],
          good.task.metadata, bad.attempts, len(bad.errors), str(bad.status)])
    """
    value, attempts, errors, metadata, tried, failed, status = web(tree, script)
    assert value == {"attempt": 3, "metadata": {"colour": "blue"}}
    assert (attempts, metadata, tried, status) == (3, {"colour": "blue"}, 3, "FAILED")
    # What was told of several attempts at once tells of the newest.
    assert set(errors) <= {"builtins.ConnectionError"}
    assert 1 <= failed <= 3


def test_run_after_and_cancel(tree: Tree) -> None:
    id = web(tree, "show(orders.later.using(run_after=timezone.now() + timedelta(hours=1)).enqueue(1).id)")
    eventually(lambda: tree.http.get(f"/api/v1/runs/{id}").status_code == 200, 10.0, "the run")
    assert tree.snapshot(id)["status"] == "READY"
    assert tree.http.post(f"/api/v1/runs/{id}/cancel").is_success
    found = web(
        tree,
        f"r = done(orders.later.get_result({id!r})); show([str(r.status), r.errors[0].exception_class.__name__])",
    )
    assert found == ["FAILED", "TaskCancelled"]


def test_a_transaction_that_is_rolled_back_never_runs(tree: Tree) -> None:
    script = """
    class Never(Exception): ...
    try:
        with transaction.atomic():
            lost = orders.later.enqueue(1)
            raise Never
    except Never: pass
    with transaction.atomic():
        kept = orders.later.enqueue(2)
        tasks.flaky.enqueue_on_commit(1)
    try:
        orders.later.get_result(lost.id)
    except Exception as error:
        show([type(error).__name__, done(kept).return_value])
    """
    assert web(tree, script) == ["TaskResultDoesNotExist", 2]


def test_wrong_uses_are_refused_where_they_are_made(tree: Tree) -> None:
    script = """
    def name(call):
        try:
            call()
        except Exception as error:
            return type(error).__name__.removesuffix("Error")
    show([
        name(lambda: orders.later.using(queue_name="nowhere")),
        name(lambda: orders.later.using(priority=101)),
        name(lambda: orders.later.using(run_after=timezone.now().replace(tzinfo=None))),
        name(lambda: orders.later.enqueue(object())),
        name(lambda: orders.later.enqueue(1, 2, 3)),
        name(lambda: task_backends["default"].get_result("no id")),
        name(lambda: orders.fail.get_result(orders.later.enqueue(1).id)),
        name(lambda: replace(orders.later, func=lambda: 1)),
        name(lambda: replace(orders.later, max_attempts=0)),
    ])
    """
    assert web(tree, script) == [
        "InvalidTask",
        "InvalidTask",
        "InvalidTask",
        "Type",
        "InvalidArguments",
        "TaskResultDoesNotExist",
        "TaskResultMismatch",
        "InvalidTask",
        "InvalidTask",
    ]


def test_every_end_is_signalled_also_those_no_runner_can_tell_of(tree: Tree, heard: Path) -> None:
    script = """
    results = [orders.later.enqueue(1), orders.fail.enqueue("x"), orders.die.enqueue()]
    show([done(it).id for it in results])
    """
    fine, failed, dead = web(tree, script)

    def of(id: str) -> list[tuple[str, str, list[str]]]:
        lines = [json.loads(line) for line in heard.read_text().splitlines()]
        return [(line["signal"], line["status"], line["errors"]) for line in lines if line["id"] == id]

    eventually(lambda: len(of(dead)) == 5, 20.0, "the signals of the run that crashed")
    assert of(fine) == [
        ("task_enqueued", "READY", []),
        ("run_started", "RUNNING", []),
        ("task_started", "RUNNING", []),
        ("run_finished", "SUCCESSFUL", []),
        ("task_finished", "SUCCESSFUL", []),
    ]
    assert of(failed)[3:] == [
        ("run_finished", "FAILED", ["raised"]),
        ("task_finished", "FAILED", ["builtins.LookupError"]),
    ]
    assert of(dead)[3:] == [
        ("run_finished", "FAILED", ["crashed"]),
        ("task_finished", "FAILED", ["taskkit.errors.RunnerCrashed"]),
    ]


def test_the_same_project_with_django_s_own_backend(tree: Tree) -> None:
    """What the interface promises is the same, but for the processes: only the name of the backend differs."""
    script = """
    def tell(r):
        errors = [e.exception_class_path for e in r.errors]
        task = r.task
        return [str(r.status), r.args, r.kwargs, r.attempts, errors, task.module_path, task.queue_name, task.priority]
    asked = [orders.confirm.enqueue(1, to="x"), orders.contextual.enqueue(), orders.fail.enqueue("no")]
    show([tell(done(result)) for result in asked])
    """
    theirs = web(tree, script, SHOP_BACKEND=f"{PACKAGE}.backends.immediate.ImmediateBackend")
    assert web(tree, script) == theirs
