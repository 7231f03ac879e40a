"""Runs of a node whose lease is over: back into the outbox, where whoever lives claims them.

What Django knows of a run is what its submission said and what its node told of it. That becomes an outbox entry of the
same id (`Submit.taken`), so that it goes the way of every submission: one node claims it, its gateway makes the run,
attempts count on, and its stream begins anew in an epoch of its own (`stream.reset` for who was in the old one).

Fence: each claim has a random name, in `Run.fence` and in the claiming gateway's store. Putting a run back gives it
another, so nothing counts any more that its former node says: transitions, answers to its submission. That node may be
paused, or cut off from the database; it finds a note when it is back (`Takeover`), and forgets its copy without a word.

Best effort, on purpose: user code of a paused node runs on until that node has read its notes; only its outcome does
not count. What Django was not told does not survive: events and inputs of the old node, a cancellation under way, an
attempt that began in its last moments (the next has its number), an end that it did not get to tell (it is performed
again), what ended runs had told those that come after them (which fail). So a task with `on_lost="fail"`, which may
have begun wherever a dead node had claimed it, has failed. A run whose options Django does not know waits for its own
node.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec
from django.db import connections, transaction
from django.db.models import F
from django.db.models.functions import Now

from taskkit import failpoints
from taskkit.identifiers import new_token
from taskkit.lifecycle import Ending, RunStatus
from taskkit.models import OPEN, Node, Outbox, Run, Takeover
from taskkit.wire.messages import Disown, Taken

#: Runs put back in one transaction, and notes read at once.
BATCH: Final = 100


def owners(using: str, nodes: Sequence[str]) -> list[str]:
    """Return those of the nodes that have open runs which another can go on with.

    Raises:
      DatabaseError: the database is away.
    """
    if not nodes:
        return []
    runs = Run.objects.using(using).filter(status__in=OPEN, node__in=nodes, options__isnull=False)
    return sorted(set(runs.order_by().values_list("node", flat=True).distinct()))


def put_back(using: str, node: str) -> int:
    """Put up to BATCH runs of a node back into the outbox, if its lease is still over; return how many.

    Raises:
      DatabaseError: the database is away; nothing was done.
    """
    with transaction.atomic(using=using):
        if not _hold(using, node):
            return 0
        runs = list(_locked(using, node))
        ids = [run.id for run in runs]
        named = {run.options["parent"] for run in runs if run.options and run.options.get("parent")}
        open_runs = Run.objects.using(using).filter(id__in=named, status__in=OPEN)
        parents = {str(id) for id in open_runs.values_list("id", flat=True)}
        fence = new_token()
        Takeover.objects.using(using).bulk_create(
            [Takeover(run=run.id, node=node, fence=run.fence, at=Now()) for run in runs]
        )
        # A claimed submission that was not accepted yet, as far as is known.
        Outbox.objects.using(using).filter(id__in=ids)._raw_delete(using)
        Outbox.objects.using(using).bulk_create([_entry(run, parents) for run in runs])
        Run.objects.using(using).filter(id__in=ids).update(
            node="", fence=fence, status=RunStatus.READY.value, moves=F("moves") + 1
        )
        failpoints.hit("takeover.written")
    failpoints.hit("takeover.committed")
    return len(runs)


def _hold(using: str, node: str) -> bool:
    """Keep a node from renewing its lease until the transaction ends; return whether it is over, and nobody else at it.

    Others do not wait: whoever is at it may have been stopped in the middle.
    """
    nodes = Node.objects.using(using).filter(name=node, expires_at__lte=Now())
    if connections[using].features.has_select_for_update_skip_locked:
        return bool(nodes.select_for_update(skip_locked=True).values_list("name", flat=True))
    return bool(nodes.update(pid=F("pid")))  # a write first, as every transaction here


def _locked(using: str, node: str) -> Any:
    """Return the runs; what the node is just writing is left for the next time, when it may have ended."""
    runs = Run.objects.using(using).filter(node=node, status__in=OPEN, options__isnull=False).order_by("id")
    if connections[using].features.has_select_for_update_skip_locked:
        runs = runs.select_for_update(skip_locked=True)
    return runs[:BATCH]


def _entry(run: Run, parents: Collection[str]) -> Outbox:
    """Return the entry of a run; a parent that is not open is nobody's to know."""
    began = run.status == RunStatus.RUNNING
    codes = [error.get("code") for error in run.errors if isinstance(error, dict)]
    lost = codes.count(Ending.LOST.value) + began
    taken = Taken(
        node=run.node,
        moves=run.moves + 1,
        version=run.version,
        attempt=run.attempt,
        counted=max(0, run.attempt - lost),
        crashes=codes.count(Ending.CRASHED.value),
        began=began,
        runner=run.worker_ids[-1] if run.worker_ids else "",
        created_at=run.created_at.timestamp(),
        started_at=None if run.started_at is None else run.started_at.timestamp(),
    )
    payload = {
        "task": run.task,
        "args": run.args,
        "kwargs": run.kwargs,
        "metadata": run.metadata,
        "tags": run.tags,
        **(run.options or {}),
        "taken": msgspec.to_builtins(taken),
    }
    if payload.get("parent") not in parents:
        payload.pop("parent", None)
    return Outbox(id=run.id, payload=payload, row_key=run.row_key, created_at=run.created_at)


class Notes:
    """What this node has to forget, read from one database and told to the gateway.

    Args:
      node: name of this node.

    Attributes:
      more: there may be more than was read last.
    """

    def __init__(self, using: str, node: str) -> None:
        self._using = using
        self._node = node
        self._asked: dict[tuple[str, str], int] = {}
        self.more = False
        self._done: list[int] = []

    @property
    def has_news(self) -> bool:
        """Whether `settle` has something to write."""
        return bool(self._done)

    def send_anew(self) -> None:
        """The gateway that was told is gone."""
        self._asked.clear()

    def read(self) -> list[Disown]:
        """Return what the gateway was not told yet.

        Raises:
          DatabaseError: the database is away.
        """
        notes = Takeover.objects.using(self._using).filter(node=self._node).order_by("id")
        told: list[Disown] = []
        limit = BATCH + len(self._asked)
        for id, run, fence in notes.values_list("id", "run", "fence")[:limit]:
            if (str(run), fence) not in self._asked:
                self._asked[str(run), fence] = id
                told.append(Disown(run=str(run), fence=fence))
        self.more = len(told) >= BATCH
        return told

    def take(self, run: str, fence: str) -> bool:
        """Take the gateway's word that it has forgotten a copy, if it was told from here."""
        id = self._asked.pop((run, fence), None)
        if id is not None:
            self._done.append(id)
        return id is not None

    def settle(self) -> None:
        """Remove the notes that are done with.

        Raises:
          DatabaseError: the database is away; it is done later.
        """
        Takeover.objects.using(self._using).filter(id__in=self._done)._raw_delete(self._using)
        self._done.clear()
