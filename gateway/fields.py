"""Fields of JSON bodies: the rule that checks a value is the one that describes it.

Pure. A field that is absent and one that is null are the same.
"""

from __future__ import annotations

import datetime
import itertools
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from gateway.arguments import MAX_ERRORS
from taskkit.identifiers import parse_run_id

Schema = dict[str, Any]

_RFC3339_UTC: Final = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|\+00:00)"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body.

    Attributes:
      check: whether a value is right.
      complaint: what to say when it is not.
      schema: the same as JSON Schema (2020-12), as far as that can say it.
      doc: what it is for.
    """

    check: Callable[[Any], bool]
    complaint: str
    schema: Schema
    doc: str = ""

    def about(self, doc: str, complaint: str | None = None) -> Field:
        """Return the same rule for a certain field."""
        return replace(self, doc=doc, complaint=complaint or self.complaint)


def parse_time(text: str) -> float | None:
    """Return the Unix time of an RFC 3339 text in UTC, or None when it is none."""
    if not re.fullmatch(_RFC3339_UTC, text, re.ASCII):
        return None
    try:
        moment = datetime.datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.timestamp()


def is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold, and no truth value."""
    # A whole number of 400 digits is JSON; math.isfinite and float would raise on it.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def text(low: int = 0, high: int | None = None) -> Field:
    """Return the rule of a text of `low` to `high` characters."""
    schema: Schema = {"type": "string", "minLength": low} | ({} if high is None else {"maxLength": high})
    return Field(
        lambda value: isinstance(value, str) and low <= len(value) and (high is None or len(value) <= high),
        "must be text" if high is None else f"must be text of {low} to {high} characters",
        schema,
    )


def whole(low: int, high: int) -> Field:
    """Return the rule of a whole number."""
    return Field(
        lambda value: type(value) is int and low <= value <= high,
        f"must be a whole number from {low} to {high}",
        {"type": "integer", "minimum": low, "maximum": high},
    )


def seconds(high: float) -> Field:
    """Return the rule of a number of seconds, 0 included."""
    return Field(
        lambda value: is_number(value) and 0 <= value <= high,
        f"must be a number of seconds from 0 to {high:g}",
        {"type": "number", "minimum": 0, "maximum": high},
    )


def some_seconds() -> Field:
    """Return the rule of a number of seconds that is not 0."""
    return Field(
        lambda value: is_number(value) and value > 0,
        "must be a number of seconds above 0",
        {"type": "number", "exclusiveMinimum": 0},
    )


def time_in_utc() -> Field:
    """Return the rule of a moment."""
    return Field(
        lambda value: isinstance(value, str) and parse_time(value) is not None,
        "must be an RFC 3339 time in UTC, for example 2026-01-31T12:00:00Z; convert other zones before",
        {"type": "string", "format": "date-time", "pattern": f"^{_RFC3339_UTC}$"},
    )


def uuid7() -> Field:
    """Return the rule of an id as this package makes them."""
    return Field(
        _is_uuid7,
        "must be a UUIDv7",
        {
            "type": "string",
            "format": "uuid",
            "pattern": "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        },
    )


def _is_uuid7(value: object) -> bool:
    found = parse_run_id(value) if isinstance(value, str) else None
    return found is not None and uuid.UUID(found).version == 7


def texts(most: int, longest: int) -> Field:
    """Return the rule of a list of short texts."""
    one = text(1, longest)
    return Field(
        lambda value: isinstance(value, list) and len(value) <= most and all(map(one.check, value)),
        f"must be a list of at most {most} texts of 1 to {longest} characters",
        {"type": "array", "maxItems": most, "items": one.schema},
    )


def listed(one: Field, most: int) -> Field:
    """Return the rule of a list of values of one rule."""
    return Field(
        lambda value: isinstance(value, list) and len(value) <= most and all(map(one.check, value)),
        f"must be a list, at most {most} items, each of which {one.complaint}",
        {"type": "array", "maxItems": most, "items": one.schema},
    )


def array() -> Field:
    """Return the rule of a list of anything."""
    return Field(lambda value: isinstance(value, list), "must be a list", {"type": "array"})


def mapping() -> Field:
    """Return the rule of an object with anything in it."""
    return Field(lambda value: isinstance(value, dict), "must be an object", {"type": "object"})


def body_schema(fields: Mapping[str, Field], required: Iterable[str] = ()) -> Schema:
    """Return the JSON Schema of an object with these fields, and no other."""
    needed = list(required)
    return {
        "type": "object",
        "properties": {name: _property(field, name in needed) for name, field in fields.items()},
        "required": needed,
        "additionalProperties": False,
    }


def _property(field: Field, needed: bool) -> Schema:
    schema = field.schema if needed else {"anyOf": [field.schema, {"type": "null"}]}
    return schema | ({"description": field.doc} if field.doc else {})


def read(body: Mapping[str, Any], fields: Mapping[str, Field], errors: dict[str, str]) -> dict[str, Any]:
    """Return the values of the fields in `body` that are there; what is wrong is noted in `errors`, by field."""
    there = f"there is {', '.join(fields)}" if fields else "there is none"
    unknown = itertools.islice((key for key in body if key not in fields), MAX_ERRORS)
    errors |= {key[:100]: f"is no field here; {there}" for key in unknown}
    values = {name: body[name] for name in fields if body.get(name) is not None}
    errors |= {
        name: fields[name].complaint for name, value in values.items() if not fields[name].check(value)
    }
    return values
