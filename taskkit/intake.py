"""Task rows made from submitted fields: checked as a form would, saved with their submission, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db import (
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    close_old_connections,
    router,
    transaction,
)
from django.db.models import Field, Model

from taskkit.errors import InvalidArguments, NotWritable
from taskkit.models import ROW_KEY_LENGTH, Outbox, Run
from taskkit.outbox import alias_of, insert_rows
from taskkit.registry import TaskDefinition
from taskkit.rows import row_address
from taskkit.stream_task import StreamTask
from taskkit.wire.messages import Created, Row, Submit


def save(definition: TaskDefinition, fields: dict[str, Any], submission: Submit, *, ask: str) -> Created:
    """Save a new row of the task model with its submission, or find the row that this submission has already.

    Row, outbox entry and projection are one transaction (two, where routers keep our tables in another database
    than the row). So a row that was saved gets its run whatever dies before the gateway has accepted it: the
    courier brings the entry. The same submission again, known by its id or its idempotency key, makes no second
    row.

    Args:
      fields: JSON values by field name; only the task's `submit_fields`.

    Raises:
      InvalidArguments: a field is unknown, or `full_clean` or a constraint refuses the row; `errors` has a
        message per field, `__all__` for what concerns several. The caller's fault.
      NotWritable: the database is away or locked. Nothing was saved, as far as one can know.
    """
    if definition.model is None:
        raise InvalidArguments(f"{definition.info.name} is a function; it takes arguments, no fields")
    close_old_connections()  # as Django does before a request: the server may have been restarted since
    try:
        with _translated(definition, router.db_for_write(definition.model)):
            return _save(definition, definition.model, fields, submission, ask)
    finally:
        close_old_connections()


def _save(
    definition: TaskDefinition, model: type[StreamTask], fields: dict[str, Any], submission: Submit, ask: str
) -> Created:
    alias, using = router.db_for_write(model), alias_of(model())
    found = _saved_before(model, submission, alias, using)
    if found is None:
        row = _build(model, fields, _allowed(definition))
        try:
            found = submission.id, _insert(row, submission, alias, using)
        except IntegrityError:
            # Perhaps its id is taken since: a runner that a gateway asked before it died may just have saved it.
            found = _saved_before(model, submission, alias, using)
            if found is None:
                raise
    owners = Run.objects.using(using).filter(id=found[0]).values_list("node", "fence")
    node, fence = next(iter(owners), (submission.node, submission.fence))
    return Created(ask=ask, run=found[0], row=found[1], using=using, node=node, fence=fence)


def _insert(row: StreamTask, submission: Submit, alias: str, using: str) -> Row:
    with transaction.atomic(using=alias):
        row.full_clean()
        row.save(using=alias, force_insert=True)
        address = row_address(type(row), row.pk, alias)
        if len(address.key) <= ROW_KEY_LENGTH:  # a longer one has no projection that could be found again
            with transaction.atomic(using=using):
                insert_rows(msgspec.structs.replace(submission, row=address, using=using))
    return address


def _saved_before(model: type[Model], submission: Submit, alias: str, using: str) -> tuple[str, Row] | None:
    """Return (id, row) of what an earlier try of this submission has saved."""
    waiting = Outbox.objects.using(using).filter(state=Outbox.State.PENDING)
    if submission.key is not None:
        for id_, payload in waiting.filter(payload__key=submission.key).values_list("id", "payload"):
            other = msgspec.convert({**payload, "id": str(id_), "message": "Submit"}, Submit)
            if (other.subject, other.digest) == (submission.subject, submission.digest) and other.row:
                return other.id, other.row
    keys = Run.objects.using(using).filter(id=submission.id).values_list("row_key", flat=True)
    for key in filter(None, keys[:1]):
        return submission.id, row_address(model, key.partition(":")[2], alias)
    return None


@contextmanager
def _translated(definition: TaskDefinition, alias: str) -> Iterator[None]:
    """Say whose fault it is when a row cannot be saved."""
    try:
        yield
    except ValidationError as error:
        raise _refusal(definition, _by_field(error)) from error
    except (IntegrityError, DataError) as error:
        # A rival took the value since full_clean, or the column cannot hold it.
        raise _refusal(definition, {NON_FIELD_ERRORS: f"the database refuses the row: {error}"}) from error
    except (OperationalError, InterfaceError) as error:
        raise NotWritable(
            f"the database {alias!r} does not take the row now: {error}{_hint(error)}", retry_after=1.0
        ) from error


def _hint(error: Exception) -> str:
    if "no such table" in str(error) or "no column named" in str(error):
        return "; run `python manage.py migrate`, or look whether this is the database that is meant"
    return ""


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
