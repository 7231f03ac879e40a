"""Outbox entries to `Submit` messages, oldest first."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, Final

import msgspec
from django.db import connections
from django.db.models import F, QuerySet

from taskkit.errors import LocalWireError, NotWritable, QueueFull
from taskkit.models import Outbox
from taskkit.seqpacket import MESSAGE_LIMIT
from taskkit.wire import codec
from taskkit.wire.messages import Submit, Submitted

#: Answers that say "later", not "never".
LATER: Final = frozenset({QueueFull.code, NotWritable.code})


def read(using: str, excluded: Collection[str], limit: int) -> tuple[list[Submit], list[Submitted]]:
    """Return up to `limit` pending submissions of the database `using`, with refusals of malformed ones.

    Args:
      excluded: ids that were sent and wait for their answer.
    """
    pending = _pending(using)
    if excluded:
        pending = pending.exclude(id__in=list(excluded))
    submissions, refusals = [], []
    for id_, payload in pending[:limit]:
        try:
            submissions.append(_submission(str(id_), payload, using))
        except (msgspec.ValidationError, LocalWireError, TypeError) as error:
            refusals.append(
                Submitted(id=str(id_), code="invalid-submission", error=f"malformed outbox entry: {error}")
            )
    return submissions, refusals


@functools.cache
def _pending(using: str) -> QuerySet[Outbox, tuple[Any, Any]]:
    """Return a query that is never evaluated itself: to put it together takes longer than to ask it."""
    pending = Outbox.objects.using(using).filter(state=Outbox.State.PENDING)
    return pending.order_by("id").values_list("id", "payload")


def _submission(id_: str, payload: object, using: str) -> Submit:
    if not isinstance(payload, dict):
        raise TypeError(f"the payload is {type(payload).__name__}, no object")
    submission = msgspec.convert({**payload, "id": id_, "using": using, "message": "Submit"}, Submit)
    if len(codec.pack(submission)) > MESSAGE_LIMIT:
        raise LocalWireError(f"it has more than {MESSAGE_LIMIT} bytes")
    return submission


def postpone(using: str, answer: Submitted) -> None:
    """Note that the gateway put this submission off; it stays pending.

    Raises:
      DatabaseError: the database is away.
    """
    entry = Outbox.objects.using(using).filter(id=answer.id)
    entry.update(attempts=F("attempts") + 1, error=(answer.error or answer.code).replace("\0", "\ufffd"))


def data_version(using: str) -> int | None:
    """Return SQLite's counter of what other connections committed to this file; None for other databases.

    Two equal readings on one connection mean that nothing changed in between. Source: SQLite,
    "PRAGMA data_version".
    """
    connection = connections[using]
    if connection.vendor != "sqlite":
        return None
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA data_version")
        row = cursor.fetchone()
    return None if row is None else int(row[0])
