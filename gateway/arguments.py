"""Arguments of a task against the JSON Schema of its parameters, in sentences for people.

Pure.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import jsonschema
import msgspec

#: A compiled schema.
Validator: TypeAlias = jsonschema.Draft202012Validator

#: Deepest nesting. msgpack stops at 511 levels and a runner's own code recurses over the value; 100 is far
#: above what people write (PostgreSQL's jsonb and Python's json have no such limit but the stack).
MAX_DEPTH: Final = 100

#: Most messages of one answer: an argument list with a million wrong items needs no million sentences.
MAX_ERRORS: Final = 20

_WORDS: Final = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _converts_to(type: Any) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        if isinstance(value, str):
            msgspec.convert(value, type=type)
        return True

    return check


def _formats() -> jsonschema.FormatChecker:
    """Return checks for the formats that a runner converts, by the very function that converts there."""
    checker = jsonschema.FormatChecker(formats=())
    for name, type in (
        ("date-time", datetime.datetime),
        ("date", datetime.date),
        ("time", datetime.time),
        ("duration", datetime.timedelta),
        ("uuid", uuid.UUID),
        ("decimal", decimal.Decimal),
    ):
        checker.checks(name, raises=(msgspec.ValidationError, ValueError))(_converts_to(type))
    return checker


_FORMATS: Final = _formats()


def compile_schema(schema: Mapping[str, Any]) -> Validator:
    """Return the JSON Schema (2020-12) of a task's parameters, ready to check."""
    return Validator(schema, format_checker=_FORMATS)


def unfit(value: object) -> str | None:
    """Return why `value` does not pack and cannot reach a runner, or None: large integers, deep nesting."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        for item in level:
            if isinstance(item, int) and not -(2**63) <= item < 2**64:
                return "has a whole number above 64 bits; send it as text"
        level = list(_children(level))
        if not level:
            return None
    return f"is nested deeper than {MAX_DEPTH} levels"


def _children(items: Iterable[object]) -> Iterator[object]:
    for item in items:
        if isinstance(item, dict):
            yield from item.values()
        elif isinstance(item, list):
            yield from item


def argument_errors(validator: Validator, named: dict[str, Any]) -> dict[str, str]:
    """Return what the schema has against the arguments: a sentence by parameter, at most MAX_ERRORS."""
    found: dict[str, str] = {}
    for error in itertools.islice(validator.iter_errors(named), MAX_ERRORS):
        for name, sentence in _sentences(error):
            found.setdefault(name, sentence)
    return dict(itertools.islice(found.items(), MAX_ERRORS))


def _sentences(error: jsonschema.ValidationError) -> Iterator[tuple[str, str]]:
    where = _path(error.absolute_path)
    prefix = f"{where}." if where else ""
    if error.validator == "required" and isinstance(error.instance, dict):
        for name in _names(error.validator_value):
            if name not in error.instance:
                yield f"{prefix}{name}", "is missing"
    elif error.validator in ("additionalProperties", "unevaluatedProperties") and isinstance(
        error.instance, dict
    ):
        known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
        for name in error.instance:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "there is none"
                yield f"{prefix}{name[:100]}", f"is no parameter; {there}"
    else:
        yield where or "kwargs", _sentence(error)


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _path(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:100]}" if text else part[:100]
    return text


def _sentence(error: jsonschema.ValidationError) -> str:
    if error.validator == "type" or error.validator == "anyOf":
        expected = _expected(error.schema) if isinstance(error.schema, dict) else ()
        if expected:
            return f"must be {' or '.join(_WORDS[name] for name in expected)}, not {_kind(error.instance)}"
    if error.validator == "format":
        return f"must be text in the format {error.validator_value}, not {_shown(error.instance)}"
    if error.validator == "enum":
        return f"must be one of {_shown(error.validator_value, 300)}, not {_shown(error.instance)}"
    return error.message[:300]


def _expected(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the plain types that a schema allows; empty when it wants more than a type."""
    if "anyOf" in schema:
        parts = [_expected(part) for part in schema["anyOf"]]
        return tuple(itertools.chain.from_iterable(parts)) if all(parts) else ()
    types = schema.get("type", ())
    names = (types,) if isinstance(types, str) else tuple(types)
    return names if all(name in _WORDS for name in names) else ()


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return _shown(value)
    return "a list" if isinstance(value, list) else "an object"


def _shown(value: object, limit: int = 80) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= limit else f"{text[:limit]}…"
