"""Tasks performed in the test's process, as a project's own tests do it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import transaction

from taskkit.errors import InvalidArguments, UnknownTask

pytestmark = pytest.mark.usefixtures("django_project")


def test_a_result_and_its_events() -> None:
    from taskkit.testing import perform

    done = perform("proj.gen", 3).check()
    assert (done.status, done.attempts, done.error) == ("SUCCESSFUL", 1, None)
    assert [event.offset for event in done.events] == [1, 2, 3]
    assert [event.data["step"] for event in done.of("progress")] == [1, 2, 3]
    assert done.of("progress")[0].data["_run"] == done.id


def test_functions_their_names_async_generators_in_both_loops() -> None:
    from taskkit.testing import perform
    from tests.project import tasks

    assert perform(tasks.add, 1, b=2).result == 3
    assert len(perform(tasks.agen, n=2).events) == 2
    assert perform("proj.asleepy", seconds=0).check().status == "SUCCESSFUL"


@pytest.mark.parametrize("task", ["proj.ask", "proj.ask_async", "proj.ask_trio"])
def test_a_task_hears_what_the_test_says(task: str) -> None:
    from taskkit.testing import inputs, perform

    with inputs(answer=[{"n": 1}, {"n": 2}]):
        assert perform(task, n=2).check().result == [{"n": 1}, {"n": 2}]
        done = perform(task, n=3)
    assert isinstance(done.exception, TimeoutError), "it does not wait for what never comes"
    assert isinstance(perform(task).exception, TimeoutError)


def test_what_it_raises_is_in_the_result() -> None:
    from taskkit.testing import perform

    done = perform("proj.boom", message="no")
    assert (done.status, done.result) == ("FAILED", None)
    assert done.error is not None
    assert done.error["code"] == "raised"
    assert "no" in done.error["message"]
    with pytest.raises(Exception, match="no"):
        done.check()


def test_attempts_are_made_without_waiting() -> None:
    from taskkit.testing import perform

    assert perform("proj.flaky", succeed_on=2).attempts == 2


def test_what_a_runner_would_refuse_is_refused() -> None:
    from taskkit.testing import perform

    with pytest.raises(UnknownTask):
        perform("proj.nothing")
    with pytest.raises(InvalidArguments):
        perform("proj.add", a=1, b="x")
    with pytest.raises(TypeError):
        perform("proj.echo", object())
    assert perform("proj.unprintable").status == "FAILED"


def test_a_row_is_marked_as_completed() -> None:
    from taskkit.testing import perform
    from tests.project.models import Row

    row = Row.objects.create(message="hello")
    done = perform(row).check()
    row.refresh_from_db()
    assert row.completed_at is not None
    assert done.of("message") or done.events


def test_submissions_are_performed_in_the_open_transaction() -> None:
    from taskkit import submit
    from taskkit.models import Outbox, Run
    from taskkit.testing import perform_submitted

    with transaction.atomic():
        first = submit("proj.add", kwargs={"a": 1, "b": 2}, run_after=timedelta(days=1))
        second = submit("proj.boom")
        done = perform_submitted()
        assert [one.id for one in done] == [first.id, second.id]
        assert (first.run().status, first.run().result) == ("SUCCESSFUL", 3)
        assert second.run().error["code"] == "raised"
        assert second.run().worker_ids == ["test"]
        assert not Outbox.objects.exists()
        assert perform_submitted() == []
        transaction.set_rollback(True)
    assert not Run.objects.exists()


@pytest.mark.parametrize("task", ["proj.tree", "proj.atree"])
def test_children_are_performed_where_they_are_waited_for(task: str) -> None:
    from taskkit import submit
    from taskkit.models import Run
    from taskkit.testing import perform_submitted

    with transaction.atomic():
        parent = submit(task, [[1, {"n": 2}]])
        done = perform_submitted()
        assert [one.task for one in done] == ["proj.leaf", "proj.leaf", task]
        assert done[-1].check().result == [1, {"n": 2}]
        assert (done[-1].id, {run.status for run in Run.objects.all()}) == (parent.id, {"SUCCESSFUL"})
        transaction.set_rollback(True)


def test_what_comes_after_others_is_performed_after_them() -> None:
    from taskkit import chain, step
    from taskkit.testing import perform_submitted
    from tests.project import tasks

    with transaction.atomic():
        good = chain(
            step(tasks.leaf, 1), [step(tasks.collected, 2), step(tasks.collected, 3)], step(tasks.collected)
        )
        bad = chain(step(tasks.leaf, "bad"), step(tasks.collected), step(tasks.collected))
        done = {one.id: one for one in perform_submitted()}
        assert done[good[-1].id].result == [[1, 2], [1, 3]]
        errors = [done[one.id].error or {} for one in bad]
        assert [error["code"] for error in errors] == ["raised", "dependency_failed", "dependency_failed"]
        assert [done[one.id].attempts for one in bad] == [1, 0, 0]
        transaction.set_rollback(True)
