"""Rows from submitted fields: saved, refused by field, or the database is away."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, OperationalError

from taskkit.identifiers import new_run_id
from taskkit.wire.messages import Created, Row, Submit

pytestmark = pytest.mark.usefixtures("django_project")


def _create(fields: dict[str, Any], task: str = "proj.ARow", **submission: Any) -> Created:
    from taskkit import intake, registry

    asked = Submit(**{"id": new_run_id(), "task": task, "subject": "ann"} | submission)
    return intake.save(registry.load()[task], fields, asked, ask="1")


def _errors(fields: dict[str, Any]) -> dict[str, str]:
    from taskkit.errors import InvalidArguments
    from tests.project.models import ARow

    with pytest.raises(InvalidArguments) as caught:
        _create(fields)
    assert not ARow.objects.exists()
    return caught.value.errors


def test_a_valid_row_is_saved() -> None:
    from tests.project.models import ARow

    made = _create({"message": "hi", "steps": 2, "pause": 0.5})
    row = ARow.objects.get()
    assert (row.message, row.steps, row.pause) == ("hi", 2, 0.5)
    assert made.row == Row(app="proj", model="ARow", pk=row.pk)


def test_every_wrong_field_is_named() -> None:
    assert set(_errors({"steps": "many", "pause": [], "nothing": 1})) == {"steps", "pause", "nothing"}


def test_full_clean_names_missing_and_too_long_values() -> None:
    assert set(_errors({"steps": -1})) == {"message", "steps"}
    assert "100" in _errors({"message": "x" * 101})["message"]


@pytest.mark.parametrize(
    "name", ["id", "created_at", "completed_at", "final_value", "pk", "process", "__class__"]
)
def test_other_fields_are_unknown(name: str) -> None:
    assert "a submission may set message" in _errors({"message": "x", name: 1})[name]


def test_a_function_takes_no_fields() -> None:
    from taskkit.errors import InvalidArguments

    with pytest.raises(InvalidArguments, match="is a function"):
        _create({}, "proj.echo")


def test_a_database_that_is_away_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.errors import NotWritable
    from tests.project.models import ARow

    def save(self: Any, **kwargs: Any) -> None:
        raise OperationalError("database is locked")

    monkeypatch.setattr(ARow, "save", save)
    with pytest.raises(NotWritable, match="database is locked") as caught:
        _create({"message": "x"})
    assert caught.value.retry_after == 1.0


def test_a_constraint_that_strikes_late_is_the_callers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.project.models import ARow

    def save(self: Any, **kwargs: Any) -> None:
        raise IntegrityError("UNIQUE constraint failed")

    monkeypatch.setattr(ARow, "save", save)
    assert "UNIQUE" in _errors({"message": "x"})["__all__"]


def test_a_row_comes_with_the_outbox_entry_of_its_submission() -> None:
    from taskkit.models import Outbox, Run

    made = _create({"message": "hi"}, priority=7, tags=["a"], metadata={"b": 1}, key="k", digest=b"\1\xff")
    assert made.row is not None
    entry, run = Outbox.objects.get(), Run.objects.get()
    assert str(entry.id) == str(run.id) == made.run
    assert entry.row_key == run.row_key == made.row.key
    assert (run.status, run.version, run.tags, run.metadata) == ("READY", 0, ["a"], {"b": 1})
    from taskkit.courier import outbox_reader

    (submission,), refusals = outbox_reader.read("default", (), 9)
    assert not refusals
    assert submission == Submit(
        id=made.run,
        task="proj.ARow",
        row=made.row,
        priority=7,
        tags=["a"],
        metadata={"b": 1},
        subject="ann",
        key="k",
        digest=b"\1\xff",
    )


def test_a_row_without_its_entry_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit import intake
    from taskkit.errors import NotWritable
    from taskkit.models import Run
    from tests.project.models import ARow

    def insert(submission: Submit) -> None:
        raise OperationalError("disk full")

    monkeypatch.setattr(intake, "insert_rows", insert)
    with pytest.raises(NotWritable, match="disk full"):
        _create({"message": "hi"})
    assert not ARow.objects.exists()
    assert not Run.objects.exists()


def test_the_same_id_finds_its_row_whether_the_courier_was_there_or_not() -> None:
    from taskkit.models import Outbox
    from tests.project.models import ARow

    first = _create({"message": "hi"})
    assert _create({"message": "hi"}, id=first.run) == first
    Outbox.objects.all().delete()
    assert _create({"message": "hi"}, id=first.run) == first
    assert ARow.objects.count() == 1


def test_the_same_key_finds_the_row_and_the_id_of_the_first_try() -> None:
    from tests.project.models import ARow

    first = _create({"message": "hi"}, key="k", digest=b"1")
    assert _create({"message": "hi"}, key="k", digest=b"1") == first
    others = [
        _create({"message": "hi"}, key="k", digest=b"1", subject="bob"),
        _create({"message": "hi"}, key="k", digest=b"2"),
        _create({"message": "hi"}, key="other", digest=b"1"),
    ]
    assert len({made.run for made in [first, *others]}) == 4
    assert ARow.objects.count() == 4


def test_a_rival_with_the_same_id_leaves_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit import intake
    from tests.project.models import ARow

    first = _create({"message": "hi"})
    look, looks = intake._saved_before, []

    def late(*args: Any) -> Any:
        looks.append(args)
        return look(*args) if len(looks) > 1 else None

    monkeypatch.setattr(intake, "_saved_before", late)
    assert _create({"message": "hi"}, id=first.run) == first
    assert ARow.objects.count() == 1


def test_a_connection_that_broke_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import ProgrammingError, connection

    from tests.project.models import ARow

    _create({"message": "before"})
    monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", None)
    monkeypatch.setattr(connection, "is_usable", lambda: False)  # SQLite's own says True whatever happens
    connection.ensure_connection()
    connection.connection.close()  # as a server does when it restarts: Django has not noticed
    with pytest.raises(ProgrammingError):  # SQLite's word for it
        _create({"message": "lost"})
    _create({"message": "after"})
    assert list(ARow.objects.values_list("message", flat=True)) == ["before", "after"]


def test_its_run_is_claimed_with_it_and_a_repetition_hears_by_whom() -> None:
    from taskkit.models import Outbox, Run

    first = _create({"message": "hi"}, key="k", digest=b"d", node="n1", fence="f1")
    run = Run.objects.get()
    assert (first.node, first.fence, run.node, run.fence) == ("n1", "f1", "n1", "f1")
    assert not {"node", "fence"} & Outbox.objects.get().payload.keys()
    again = _create({"message": "hi"}, key="k", digest=b"d", node="n2", fence="f2")
    assert (again.run, again.node, again.fence) == (first.run, "n1", "f1")
