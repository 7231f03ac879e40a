"""`manage.py create_task`: a row of a task model, or a run of a function."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from django.core.exceptions import ValidationError
from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.db.models import JSONField

from taskkit import registry
from taskkit.errors import InvalidArguments, UnknownTask
from taskkit.outbox import submit
from taskkit.rows import AmbiguousModel, UnknownModel, find_model
from taskkit.stream_task import StreamTask

_PAIR: Final = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Command(BaseCommand):
    """Makes a task and starts it; the tree finds it in the database, whenever it runs."""

    help = "Make a task and start it: manage.py create_task reports.YearReport year=2026"

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "task", nargs="?", help="A task's name, or that of a task model in any letter case."
        )
        parser.add_argument(
            "values", nargs="*", metavar="KEY=VALUE", help="Fields, or arguments; JSON or text."
        )
        parser.add_argument("--type", metavar="TASK", help="The task's name, if it is not given first.")
        parser.add_argument("--message", help="The same as message=…")
        parser.add_argument("--no-start", action="store_true", help="Only save the row.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Make it."""
        words = [word for word in (options["task"], *options["values"]) if word is not None]
        name = options["type"] or (words.pop(0) if words else None)
        if name is None:
            raise CommandError("which task? `bulkhead tasks` lists them")
        values = dict(map(_pair, words))
        if options["message"] is not None:
            values["message"] = options["message"]
        model = _model(name)
        if model is not None:
            self._row(model, values, start=not options["no_start"])
        elif options["no_start"]:
            raise CommandError(f"{name} is a function: it has no row that could be saved and not started")
        else:
            self._run(name, values)

    def _row(self, model: type[StreamTask], values: dict[str, str], *, start: bool) -> None:
        names = {field.name for field in model._meta.concrete_fields}
        if unknown := sorted(set(values) - names):
            raise CommandError(
                f"{model._meta.label} has no field {unknown[0]!r}; it has {', '.join(sorted(names))}"
            )
        row = model(**values)
        try:
            row.full_clean()
        except ValidationError as error:
            told = (f"{name}: {' '.join(words)}" for name, words in error.message_dict.items())
            raise CommandError(f"{model._meta.label}: {'; '.join(told)}") from error
        with transaction.atomic(using=row._state.db):
            row.save()
            run = submit(row) if start else None
        meta = model._meta
        self.stdout.write(f"Created {meta.label} {row.pk}" + ("" if run is None else f", run {run.id}"))
        self.stdout.write(f"Follow it: manage.py watch_task {meta.app_label} {meta.object_name} {row.pk}")

    def _run(self, name: str, values: dict[str, str]) -> None:
        try:
            run = submit(name, kwargs={key: _json(value) for key, value in values.items()})
        except (UnknownTask, InvalidArguments, TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"Submitted {name}, run {run.id}")
        self.stdout.write(f"Follow it: manage.py watch_task {run.id}")


def _model(name: str) -> type[StreamTask] | None:
    """Return the task model of this name, None when it is that of a function.

    Raises:
      CommandError: there is neither, or several models have it.
    """
    app, _, model = name.rpartition(".")
    try:
        return find_model(app, model)
    except AmbiguousModel as error:
        raise CommandError(str(error)) from error
    except UnknownModel:
        try:
            registry.find(name)
        except UnknownTask as error:
            raise CommandError(f"{error}; `bulkhead tasks` lists what there is") from error
    return None


def _fields(model: type[StreamTask], values: dict[str, str]) -> dict[str, Any]:
    """Return the values by attribute; a related row is given by its key. `full_clean` makes of the text what it is."""
    fields = {field.name: field for field in model._meta.concrete_fields}
    if unknown := sorted(set(values) - set(fields)):
        known = ", ".join(sorted(fields))
        raise CommandError(f"{model._meta.label} has no field {unknown[0]!r}; it has {known}")
    return {
        fields[name].attname: _json(text) if isinstance(fields[name], JSONField) else text
        for name, text in values.items()
    }


def _pair(word: str) -> tuple[str, str]:
    found = _PAIR.fullmatch(word)
    if found is None:
        raise CommandError(f"{word!r}: write KEY=VALUE, for example year=2026")
    return found[1], found[2]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
