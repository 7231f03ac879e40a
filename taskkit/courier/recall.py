"""Runs that Django holds to be open, compared with what the gateway's store knows of them.

A store that was wiped (a new container, a removed state directory) tells of no end of its runs any more. Without this
their projections would stay open for good, and a task row that has one could never be started again.

Rule: only what this node has is compared; and what no node has, while no other lives. A run that is wrongly held to be
forgotten comes back with its next transition: its version stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from django.utils import timezone

from taskkit.lifecycle import RunStatus
from taskkit.models import OPEN, Outbox, Run
from taskkit.wire.messages import Recall

#: Seconds from a new link to the first question, between two questions, and between two walks through all that is
#: open. The first transitions of a new gateway, up to 100 at a time, should be through.
FIRST: Final = 5.0
NEXT: Final = 1.0
PAUSE: Final = 600.0

#: Runs asked about at once.
BATCH: Final = 100

#: Age in seconds of what is asked about: younger ones may be on their way to the store.
AGE: Final = 60.0


class Comparison:
    """A walk through the open projections of one database, a few at a time.

    Args:
      using: alias of the database.
      node: name of this tree's node.
    """

    def __init__(self, using: str, node: str) -> None:
        self._using = using
        self._node = node
        self._after = ""
        self._forgotten: list[str] = []
        self._asked: set[str] = set()
        self.next = FIRST

    @property
    def has_news(self) -> bool:
        """Whether `settle` has something to write."""
        return bool(self._forgotten)

    def begin(self, now: float) -> None:
        """Ask from the beginning: the gateway is a new one."""
        self._after = ""
        self._asked.clear()
        self.next = now + FIRST

    def ask(self, now: float, *, shared: bool = False) -> list[Recall]:
        """Return the next question, about runs of this node; of nobody, too, unless the database is `shared`.

        Raises:
          DatabaseError: the database is away.
        """
        found = self._open((self._node,) if shared else ("", self._node))
        self._after = max(found, default="") if len(found) == BATCH else ""
        self.next = now + (NEXT if self._after else PAUSE)
        self._asked = set(found)
        return [Recall(runs=found)] if found else []

    def _open(self, nodes: tuple[str, ...]) -> dict[str, int]:
        """Return versions by id: what is open, has been so for a while, and does not wait in the outbox."""
        runs = Run.objects.using(self._using)
        found = runs.filter(
            status__in=OPEN, node__in=nodes, created_at__lt=timezone.now() - timedelta(seconds=AGE)
        )
        if self._after:
            found = found.filter(id__gt=self._after)
        waiting = Outbox.objects.using(self._using).filter(state=Outbox.State.PENDING).values("id")
        rows = found.exclude(id__in=waiting).order_by("id").values_list("id", "version")[:BATCH]
        return {str(id_): version for id_, version in rows}

    def take(self, run: str) -> bool:
        """Take the answer that the store does not know a run, if it was asked about here."""
        if run not in self._asked:
            return False
        self._asked.discard(run)
        self._forgotten.append(run)
        return True

    def settle(self) -> None:
        """Write down what is forgotten.

        Raises:
          DatabaseError: the database is away; it is written later.
        """
        if self._forgotten:
            forget(self._using, self._forgotten)
            self._forgotten.clear()


def forget(using: str, runs: Iterable[str]) -> None:
    """End the projections of runs that no store knows, as far as they are open."""
    error = {
        "code": "forgotten",
        "message": "the gateway's store does not know this run: it was removed or replaced",
    }
    Run.objects.using(using).filter(id__in=list(runs), status__in=OPEN).update(
        status=RunStatus.FAILED.value, error=error, finished_at=timezone.now()
    )
