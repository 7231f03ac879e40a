"""Fields of bodies: what is checked is what is described."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from gateway.api import CANCEL_FIELDS
from gateway.batch import KEY_FIELD
from gateway.fields import Field, body_schema, read, seconds, text
from gateway.submission import FIELDS, MAX_ATTEMPTS, MAX_TAG, MAX_TAGS
from taskkit.identifiers import new_run_id

EVERY: dict[str, Field] = {**FIELDS, **CANCEL_FIELDS, "idempotency_key": KEY_FIELD}

VALUES: list[Any] = [
    *(
        True,
        False,
        0,
        1,
        -1,
        1.5,
        -0.5,
        100,
        101,
        -100,
        -101,
        MAX_ATTEMPTS,
        MAX_ATTEMPTS + 1,
        3600,
        3600.5,
        1e300,
    ),
    *("", "x", "x" * 200, "x" * 201, "demo.count", "2026-01-31T12:00:00Z", "2026-01-31T12:00:00+00:00"),
    *("2026-01-31T12:00:00.123Z", "2026-01-31T12:00:00+02:00", "2026-01-31"),
    *(new_run_id(), "8f14e45f-ceea-467f-a8ab-0123456789ab", "00000000-0000-7000-8000-00000000000"),
    *([], ["x"], [1], [""], ["x" * MAX_TAG], ["x" * (MAX_TAG + 1)], ["x"] * MAX_TAGS, ["x"] * (MAX_TAGS + 1)),
    *({}, {"x": 1}),
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_a_value_is_right_exactly_if_its_schema_says_so(name: str, value: Any) -> None:
    field = EVERY[name]
    assert field.check(value) == jsonschema.Draft202012Validator(field.schema).is_valid(value)


@pytest.mark.parametrize("name", EVERY)
def test_every_field_takes_something_and_says_what(name: str) -> None:
    assert any(EVERY[name].check(value) for value in VALUES)
    assert EVERY[name].doc.endswith(".")
    assert EVERY[name].complaint.startswith("must be")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_a_number_of_seconds_is_finite(value: Any) -> None:
    assert not seconds(3600).check(value)
    assert not FIELDS["timeout"].check(value)


def test_reading_names_what_is_wrong_and_what_there_is() -> None:
    errors: dict[str, str] = {}
    fields = {"a": text(1), "b": seconds(5), "c": seconds(5)}
    values = read({"a": "", "b": 3, "c": None, "d": 1}, fields, errors)
    assert values["b"] == 3
    assert "c" not in values, "null is as good as absent"
    assert set(errors) == {"a", "d"}
    assert "there is a, b, c" in errors["d"]
    assert read({}, {}, errors) == {}


def test_null_is_described_where_a_field_may_be_left_out() -> None:
    schema = body_schema({"a": text(1), "b": seconds(5)}, ["a"])
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"a": "x", "b": None})
    assert not validator.is_valid({"a": None})
    assert not validator.is_valid({"b": 1})
    assert not validator.is_valid({"a": "x", "z": 1})
