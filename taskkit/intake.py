"""Task rows made from submitted fields: validated as a form would, saved, or refused by field."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db import IntegrityError, InterfaceError, OperationalError, router, transaction
from django.db.models import Field

from taskkit.errors import InvalidArguments, NotWritable
from taskkit.registry import TaskDefinition
from taskkit.rows import row_address
from taskkit.stream_task import StreamTask
from taskkit.wire.messages import Row


def create(definition: TaskDefinition, fields: dict[str, Any], *, using: str | None = None) -> Row:
    """Save a new row of the task model with these field values; return its address.

    Args:
      fields: JSON values by field name; only the task's `submit_fields`.
      using: alias of the database; default: what the routers say.

    Raises:
      InvalidArguments: a field is unknown, or `full_clean` or a constraint refuses the row; `errors` has a
        message per field, `__all__` for what concerns several. The caller's fault.
      NotWritable: the database is away or locked. Nothing was saved, as far as one can know.
    """
    model = definition.model
    if model is None:
        raise InvalidArguments(f"{definition.info.name} is a function; it takes arguments, no fields")
    alias = using or router.db_for_write(model)
    try:
        row = _build(model, fields, _allowed(definition))
        with transaction.atomic(using=alias):
            row.full_clean()
            row.save(using=alias, force_insert=True)
    except ValidationError as error:
        raise _refusal(definition, _by_field(error)) from error
    except IntegrityError as error:  # a rival took the value between full_clean and save
        raise _refusal(definition, {NON_FIELD_ERRORS: f"the database refuses the row: {error}"}) from error
    except (OperationalError, InterfaceError) as error:
        raise NotWritable(
            f"the database {alias!r} does not take the row now: {error}", retry_after=1.0
        ) from error
    return row_address(model, row.pk, alias)


def _allowed(definition: TaskDefinition) -> list[str]:
    """Return the names of the fields that a submission may set: the schema is made from `submit_fields`."""
    return list(definition.info.parameters.get("properties", {}))


def _build(model: type[StreamTask], fields: dict[str, Any], allowed: list[str]) -> StreamTask:
    """Return an unsaved row; all wrong fields are named at once."""
    values, errors = {}, {}
    for name, value in fields.items():
        try:
            values[name] = _parse(model, name, value, allowed)
        except ValidationError as error:
            errors[name] = error
    if errors:
        raise ValidationError({name: error.messages for name, error in errors.items()})
    return model(**values)


def _parse(model: type[StreamTask], name: str, value: Any, allowed: list[str]) -> Any:
    if name not in allowed:
        raise ValidationError(f"no such field; a submission may set {', '.join(sorted(allowed)) or 'none'}")
    field = model._meta.get_field(name)
    if not isinstance(field, Field):
        raise ValidationError("this is a relation from another model, no field of this one")
    try:
        return field.to_python(value)
    except (TypeError, ValueError, ArithmeticError) as error:  # to_python of some fields expects text only
        raise ValidationError(f"{value!r} is no value of this field: {error}") from error


def _by_field(error: ValidationError) -> dict[str, str]:
    if not hasattr(error, "error_dict"):
        return {NON_FIELD_ERRORS: " ".join(error.messages)}
    return {name: " ".join(messages) for name, messages in error.message_dict.items()}


def _refusal(definition: TaskDefinition, errors: dict[str, str]) -> InvalidArguments:
    named = "; ".join(f"{name}: {message}" for name, message in errors.items())
    return InvalidArguments(f"{definition.info.name}: {named}", errors=errors)
