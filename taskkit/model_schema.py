"""The fields of a model task as JSON Schema (2020-12).

The schema refuses early what a form would refuse anyway; the last word has `full_clean` in the intake runner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from django.core.exceptions import FieldDoesNotExist
from django.db import models
from django.db.models.fields import NOT_PROVIDED
from django.utils.choices import CallableChoiceIterator

from taskkit.schema import DIALECT
from taskkit.stream_task import StreamTask

_BASE_FIELDS: Final = frozenset(field.name for field in StreamTask._meta.local_fields)

#: First match wins: a DateTimeField is a DateField as well.
_TYPES: Final[tuple[tuple[type[models.Field[Any, Any]], dict[str, Any]], ...]] = (
    (models.BooleanField, {"type": "boolean"}),
    (models.IntegerField, {"type": "integer"}),
    (models.FloatField, {"type": "number"}),
    (models.DecimalField, {"type": ["string", "number"]}),
    (models.DateTimeField, {"type": "string", "format": "date-time"}),
    (models.DateField, {"type": "string", "format": "date"}),
    (models.TimeField, {"type": "string", "format": "time"}),
    (models.DurationField, {"type": "string"}),
    (models.UUIDField, {"type": "string", "format": "uuid"}),
    (models.EmailField, {"type": "string", "format": "email"}),
    (models.URLField, {"type": "string", "format": "uri"}),
    (models.GenericIPAddressField, {"type": "string"}),
    (models.CharField, {"type": "string"}),
    (models.TextField, {"type": "string"}),
)


def submit_fields(model: type[StreamTask]) -> list[models.Field[Any, Any]]:
    """Return the fields that a submission over HTTP may set, in the model's order or that of its
    `submit_fields`.

    By default every own editable field that is no relation (another row's owner decides about it), no file
    (its value is a path of the server's) and not the primary key.

    Raises:
      ValueError: `submit_fields` names something that is no column of the model. The task author's fault.
    """
    if model.submit_fields is None:
        return list(_default_fields(model))
    return [_named_field(model, name) for name in model.submit_fields]


def _default_fields(model: type[StreamTask]) -> Iterator[models.Field[Any, Any]]:
    for field in model._meta.concrete_fields:
        if not field.editable or field.primary_key or field.name in _BASE_FIELDS:
            continue
        if not field.is_relation and not isinstance(field, models.FileField):
            yield field


def _named_field(model: type[StreamTask], name: str) -> models.Field[Any, Any]:
    try:
        field = model._meta.get_field(name)
    except FieldDoesNotExist:
        field = None
    if not isinstance(field, models.Field) or not field.concrete or field.many_to_many:
        raise ValueError(
            f"{model.__module__}.{model.__name__}: submit_fields has {name!r}, which is no column of it"
        )
    return field


def model_parameters(model: type[StreamTask]) -> dict[str, Any]:
    """Return the JSON Schema of an object with the model's `submit_fields`.

    Raises:
      ValueError: as `submit_fields`.
    """
    fields = submit_fields(model)
    return {
        "$schema": DIALECT,
        "title": model.__name__,
        "type": "object",
        "properties": {field.name: field_schema(field) for field in fields},
        "required": [field.name for field in fields if _is_required(field)],
        "additionalProperties": False,
    }


def _is_required(field: models.Field[Any, Any]) -> bool:
    return (
        not field.blank
        and not field.has_default()
        and getattr(field, "db_default", NOT_PROVIDED) is NOT_PROVIDED
    )


def field_schema(field: models.Field[Any, Any]) -> dict[str, Any]:
    """Return the JSON Schema of one field's value; `{}`, any value, for types that are not known here."""
    schema = next((dict(found) for kind, found in _TYPES if isinstance(field, kind)), {})
    if field.max_length is not None and isinstance(field, models.CharField):
        schema["maxLength"] = field.max_length
    if field.choices and not isinstance(field.choices, CallableChoiceIterator):  # that one may be a query
        schema["enum"] = [value for value, _ in field.flatchoices]
        if field.blank and schema.get("type") == "string" and "" not in schema["enum"]:
            schema["enum"].append("")
    if field.null:
        _allow_null(schema)
    if field.help_text:
        schema["description"] = str(field.help_text)
    if field.has_default() and not callable(field.default):
        _add_default(schema, field.default)
    return schema


def _allow_null(schema: dict[str, Any]) -> None:
    kinds = schema.get("type")
    if kinds is not None:
        schema["type"] = [*([kinds] if isinstance(kinds, str) else kinds), "null"]
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]


def _add_default(schema: dict[str, Any], default: Any) -> None:
    try:
        schema["default"] = msgspec.to_builtins(default)
    except TypeError:
        schema.pop("default", None)
