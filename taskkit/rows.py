"""Task rows by the names that URLs, messages, callers use for them."""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.core.exceptions import ValidationError
from django.db.models import Model

from taskkit.stream_task import StreamTask
from taskkit.wire.messages import Row


class UnknownModel(LookupError):
    """No task model has this name."""


class AmbiguousModel(LookupError):
    """Several apps have a task model of this name: name the app as well."""


def task_models() -> list[type[StreamTask]]:
    """Return every concrete StreamTask class of the installed apps."""
    return [model for model in apps.get_models() if issubclass(model, StreamTask)]


def find_model(app: str, name: str) -> type[StreamTask]:
    """Return the task model that `name` means, in any letter case; an empty `app` means any app.

    Raises:
      UnknownModel: there is none; models that are no tasks do not count.
      AmbiguousModel: there are several.
    """
    wanted = app.lower(), name.lower()
    found = [
        model
        for model in task_models()
        if model._meta.model_name == wanted[1] and (not app or model._meta.app_label.lower() == wanted[0])
    ]
    if not found:
        raise UnknownModel(f"no task model is called {'.'.join(filter(None, (app, name)))!r}")
    if len(found) > 1:
        labels = ", ".join(sorted(model._meta.label for model in found))
        raise AmbiguousModel(f"{name!r} may be {labels}; name the app")
    return found[0]


def parse_pk(model: type[Model], text: Any) -> Any:
    """Return the primary key that `text` spells, as the model's field has it.

    Raises:
      ValueError: the field cannot parse it, or no key can look like that.
    """
    try:
        value = model._meta.pk.to_python(text)
    except ValidationError as error:
        raise ValueError(" ".join(error.messages)) from error
    if value is None or (isinstance(value, str) and "\0" in value):
        raise ValueError(f"{text!r} is no primary key")
    return value


def pk_as_json(value: Any) -> Any:
    """Return a primary key's JSON value: a number or string as it is, anything else (UUID, date) as text."""
    return value if isinstance(value, (int, str)) else str(value)


def row_address(model: type[Model], pk: Any, using: str) -> Row:
    """Return the address of the row of `model` with primary key `pk` in the database `using`."""
    meta = model._meta
    return Row(
        app=meta.app_label, model=meta.object_name or "", pk=pk_as_json(parse_pk(model, pk)), using=using
    )


def task_name(model: type[Model]) -> str:
    """Return the name under which the registry knows a task model: `<app label>.<model>`."""
    return f"{model._meta.app_label}.{model._meta.object_name}"
