"""Answers to what the gateway asks about task rows: read fresh, user code never run."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from django.db import DataError, router

from taskkit.rows import AmbiguousModel, UnknownModel, find_model, parse_pk, row_address, task_name
from taskkit.wire.messages import Answer, Ask


class Located:
    """The row that a question means: not read yet.

    Attributes:
      using: alias of the database that has it.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask.ask
        self.model = find_model(ask.app, ask.model)
        self.pk = parse_pk(self.model, ask.pk)
        self.using = router.db_for_read(self.model)

    def read(self) -> Answer:
        """Return what the database says about the row.

        Columns are read, no instance is made: a model's `__init__` and `from_db` are user code.

        Raises:
          DatabaseError: the database does not answer.
        """
        rows = self.model._base_manager.using(self.using).filter(pk=self.pk)
        try:
            found = list(rows.values_list("pk", "completed_at", "final_value")[:1])
        except (DataError, OverflowError, ValueError) as error:  # beyond what the column can hold
            return Answer(ask=self.ask, status="bad_pk", detail=str(error))
        return self._found(*found[0]) if found else Answer(ask=self.ask, status="unknown")

    def _found(self, pk: Any, completed_at: datetime | None, final_value: Any) -> Answer:
        return Answer(
            ask=self.ask,
            status="found",
            task=task_name(self.model),
            row=row_address(self.model, pk, self.using),
            completed_at=None if completed_at is None else completed_at.isoformat(),
            final_value=json.dumps(final_value, default=str).encode(),
        )


def locate(ask: Ask) -> Located | Answer:
    """Return the row that `ask` means, or the answer if there can be none. Reads no database."""
    try:
        return Located(ask)
    except UnknownModel as error:
        return Answer(ask=ask.ask, status="unknown", detail=str(error))
    except AmbiguousModel as error:
        return Answer(ask=ask.ask, status="ambiguous", detail=str(error))
    except ValueError as error:
        return Answer(ask=ask.ask, status="bad_pk", detail=str(error))
