"""Rows from submitted fields: saved, refused by field, or the database is away."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, OperationalError

pytestmark = pytest.mark.usefixtures("django_project")


def _create(fields: dict[str, Any], task: str = "proj.ARow") -> Any:
    from taskkit import intake, registry

    return intake.create(registry.load()[task], fields, using="default")


def _errors(fields: dict[str, Any]) -> dict[str, str]:
    from taskkit.errors import InvalidArguments
    from tests.project.models import ARow

    with pytest.raises(InvalidArguments) as caught:
        _create(fields)
    assert not ARow.objects.exists()
    return caught.value.errors


def test_a_valid_row_is_saved() -> None:
    from taskkit.wire.messages import Row
    from tests.project.models import ARow

    address = _create({"message": "hi", "steps": 2, "pause": 0.5})
    row = ARow.objects.get()
    assert (row.message, row.steps, row.pause) == ("hi", 2, 0.5)
    assert address == Row(app="proj", model="ARow", pk=row.pk)


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
