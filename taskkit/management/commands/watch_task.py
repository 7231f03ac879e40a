"""`manage.py watch_task`: a run's events in a terminal, its outcome as the exit code."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any, Final

from django.core.management import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS

from taskkit import conf
from taskkit.errors import GatewayError, SettingsError
from taskkit.identifiers import parse_run_id
from taskkit.lifecycle import RunStatus
from taskkit.models import Outbox, Run
from taskkit.outbox import RunHandle, alias_of
from taskkit.rows import AmbiguousModel, UnknownModel, find_model, parse_pk, row_address

#: Seconds until a submission in the outbox is a run: a courier that was not told of it looks once a second.
_PATIENCE: Final = 10.0

#: Seconds that a token for one run is valid here: as long as anybody looks on.
_TTL: Final = 86_400.0


class Command(BaseCommand):
    """Follows a run to its end; Ctrl-C leaves it running."""

    help = "Print a run's events until it has ended; exit code 0 if it succeeded, 1 if not."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "names", nargs="+", metavar="RUN | APP MODEL ID", help="A run's id, or a task's row."
        )
        parser.add_argument(
            "--database", default=DEFAULT_DB_ALIAS, help="Where the run's row is; default: default."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Follow it."""
        run = _find(options["names"], options["database"] or alias_of(None))
        try:
            self._wait(run)
            end = self._follow(run)
        except (GatewayError, SettingsError) as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            self.stderr.write(f"Run {run.id} goes on.")
            sys.exit(130)
        if end != RunStatus.SUCCESSFUL:
            sys.exit(1)

    def _wait(self, run: Run) -> None:
        """Wait until the submission is a run that the gateway knows.

        Raises:
          CommandError: it is none in time, or was refused.
        """
        using = run._state.db or DEFAULT_DB_ALIAS
        deadline = time.monotonic() + _PATIENCE
        while (entry := Outbox.objects.using(using).filter(id=run.id).first()) is not None:
            if entry.state == Outbox.State.REFUSED:
                raise CommandError(f"run {run.id} was refused: {entry.error}")
            if time.monotonic() > deadline:
                raise CommandError(
                    f"run {run.id} waits in the outbox: does a tree run? Start one: bulkhead start"
                )
            time.sleep(0.05)

    def _follow(self, run: Run) -> str:
        from taskkit.client import get_client

        token = RunHandle(str(run.id)).token(ttl=_TTL)
        end: dict[str, Any] = {}
        for event in get_client(conf.gateway_address(), token=token).follow(str(run.id)):
            self.stdout.write(f"{event.id} {event.type} {json.dumps(event.data, ensure_ascii=False)}")
            end = event.data if event.type == "stream.end" else end
        return str(end.get("status", ""))


def _find(names: list[str], using: str) -> Run:
    """Return the run that is meant: by its id, or the newest of a row.

    Raises:
      CommandError: there is none.
    """
    if len(names) == 1:
        id = parse_run_id(names[0])
        found = Run.objects.using(using).filter(id=uuid.UUID(id)).first() if id else None
        if found is None:
            raise CommandError(f"there is no run {names[0]!r} in the database {using!r}")
        return found
    if len(names) != 3:
        raise CommandError("give a run's id, or APP MODEL ID")
    app, name, key = names
    try:
        model = find_model(app, name)
        row = model._base_manager.filter(pk=parse_pk(model, key)).first()
    except (UnknownModel, AmbiguousModel, ValueError) as error:
        raise CommandError(str(error)) from error
    if row is None:
        raise CommandError(f"there is no {model._meta.label} {key}")
    address = row_address(model, row.pk, row._state.db or using)
    found = Run.objects.using(alias_of(row)).filter(row_key=address.key).first()
    if found is None:
        raise CommandError(f"{model._meta.label} {key} was never started")
    return found
