"""`manage.py create_task` and `cleanup_old_tasks`; what the other commands refuse before they begin."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

pytestmark = pytest.mark.usefixtures("django_project")


def told(command: str, *arguments: str, **options: Any) -> str:
    """Return what a command has printed."""
    output = StringIO()
    call_command(command, *arguments, stdout=output, **options)
    return output.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ("proj.Row", "message=hi", "steps=2"),
        ("row", "message=hi", "steps=2"),
        ("--type", "PROJ.row", "message=hi", "steps=2"),
        ("--type", "Row", "steps=2", "--message", "hi"),
    ],
)
def test_a_row_is_made_and_started(words: tuple[str, ...]) -> None:
    from taskkit.models import Run
    from tests.project.models import Row

    said = told("create_task", *words)
    row, run = Row.objects.get(), Run.objects.get()
    assert (row.message, row.steps, run.row_key) == ("hi", 2, f"proj.row:{row.pk}")
    assert f"Created proj.Row {row.pk}, run {run.id}" in said
    assert f"watch_task proj Row {row.pk}" in said


def test_a_row_may_wait() -> None:
    from taskkit.models import Outbox
    from tests.project.models import Row

    assert ", run" not in told("create_task", "proj.Row", "message=hi", "--no-start")
    assert (Row.objects.count(), Outbox.objects.count()) == (1, 0)


def test_a_function_is_submitted() -> None:
    from taskkit.models import Run

    assert str(Run.objects.count()) == "0"
    said = told("create_task", "proj.add", "a=1", "b=2")
    run = Run.objects.get()
    assert (run.task, run.kwargs) == ("proj.add", {"a": 1, "b": 2})
    assert f"watch_task {run.id}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "which task?"),
        (("proj.Raw", "message=x"), "did you mean|proj.Row"),
        (("proj.Row", "steps=2"), "proj.Row: message: This field"),
        (("proj.Row", "message=x", "steps=two"), "steps: .*integer"),
        (("proj.Row", "message=x", "pace=2"), "proj.Row has no field 'pace'; it has .*message, steps"),
        (("proj.Row", "message"), "write KEY=VALUE"),
        (("proj.add", "a=1"), "proj.add: .*b"),
        (("proj.add", "a=1", "b=2", "--no-start"), "is a function"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_made(words: tuple[str, ...], message: str) -> None:
    from taskkit.models import Run
    from tests.project.models import Row

    with pytest.raises(CommandError, match=message):
        told("create_task", *words)
    assert (Row.objects.count(), Run.objects.count()) == (0, 0)


def completed(hours: float, **fields: Any) -> Any:
    from tests.project.models import Row

    return Row.objects.create(message="x", completed_at=timezone.now() - timedelta(hours=hours), **fields)


def test_old_rows_go_and_what_runs_stays() -> None:
    from taskkit import submit
    from tests.project.models import ARow, Row

    old, again, young = completed(48), completed(48), completed(0.5)
    unfinished = Row.objects.create(message="x")
    ARow.objects.create(message="x", completed_at=timezone.now() - timedelta(hours=2))
    submit(again)
    assert told("cleanup_old_tasks", "--dry-run").splitlines()[-1] == "Total to delete: 2"
    assert told("cleanup_old_tasks", "--hours", "24").splitlines() == [
        "Deleted 1 proj.Row",
        "Total deleted: 1",
    ]
    assert set(Row.objects.all()) == {again, young, unfinished}
    assert old not in Row.objects.all()
    assert told("cleanup_old_tasks").splitlines()[-1] == "Total deleted: 1"
    assert ARow.objects.count() == 0


def test_more_than_a_slice_goes() -> None:
    from tests.project.models import Row

    at = timezone.now() - timedelta(hours=2)
    Row.objects.bulk_create([Row(message="x", completed_at=at) for _ in range(1_100)])
    assert "Total deleted: 1100" in told("cleanup_old_tasks")


def test_runs_go_when_asked() -> None:
    from taskkit import submit
    from taskkit.models import Run

    for _ in range(3):
        submit("proj.add", kwargs={"a": 1, "b": 2})
    old, young, _ = Run.objects.all()
    Run.objects.filter(id=old.id).update(
        status="SUCCESSFUL", finished_at=timezone.now() - timedelta(hours=100)
    )
    Run.objects.filter(id=young.id).update(status="FAILED", finished_at=timezone.now() - timedelta(hours=1))
    assert "Total deleted: 0" in told("cleanup_old_tasks")
    assert "Deleted 1 taskkit.Run in 'default'" in told("cleanup_old_tasks", "--runs", "72")
    assert Run.objects.count() == 2
    for wrong in (("--hours", "-1"), ("--runs", "nan")):
        with pytest.raises(CommandError, match="give hours"):
            told("cleanup_old_tasks", *wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-id",), "there is no run 'no-id'"),
        (("0190b5a0-0000-7000-8000-000000000001",), "there is no run"),
        (("proj", "Row"), "give a run's id, or APP MODEL ID"),
        (("proj", "Raw", "1"), "no task model is called 'proj.Raw'"),
        (("proj", "Row", "1"), "there is no proj.Row 1"),
        (("proj", "Row", "one"), "“one”"),
    ],
)
def test_what_cannot_be_watched(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        told("watch_task", *words)


def test_a_row_that_was_never_started_cannot_be_watched() -> None:
    row = completed(1)
    with pytest.raises(CommandError, match="was never started"):
        told("watch_task", "proj", "row", str(row.pk))


def test_flags_that_contradict_each_other() -> None:
    for words in (("--host", "0.0.0.0"), ("--port", "1", "--socket", "here")):
        with pytest.raises(CommandError, match="--port"):
            told("runserver_stream", *words)
