"""Asks a run to stop when nobody has followed it for a while, if its task says `on_disconnect="cancel"`.

A subscriber is whoever has a stream of the very run open (also as one of the runs named on a stream of many), or waits
for its events or its result. The grace begins when the last one leaves, and ends when somebody comes. A run that nobody
ever followed is left alone.

A gateway that ends takes its subscribers along; that cancels nothing. Which runs had some is in the store, and clients
come back by themselves. So the next gateway gives each of these runs the grace anew, RETURN_SECONDS longer: when its
clients have gone for good meanwhile, it is cancelled then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import trio

from gateway.store.rows import RunRow
from taskkit.errors import LifecycleError, NotWritable, UnknownTask

if TYPE_CHECKING:
    from gateway.engine import Engine

logger = logging.getLogger(__name__)

#: Seconds within which clients are back behind a restart: they are told to wait up to 5, and ours pause as long at most
#: between two tries.
RETURN_SECONDS: Final = 10.0

#: Seconds until a cancellation is tried again that the store did not take.
RETRY_SECONDS: Final = 1.0

#: Why the run is cancelled, in its `run.cancelling`.
REASON: Final = "disconnected"


class Attendance:
    """gateway.fanout.Audience of one engine: knows which runs have been left alone, and until when."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._grace = engine.settings.limits.disconnect_grace_seconds
        self._deadlines: dict[int, float] = {}  # by run, on trio's clock
        self._changed = trio.Event()

    def found(self, runs: Iterable[RunRow]) -> None:
        """These runs are open as the gateway starts."""
        for run in runs:
            if run.followed:
                self._set(run.no, self._grace + RETURN_SECONDS)

    def came(self, run: int) -> None:
        """See Audience. The store remembers it, for the next gateway."""
        self._deadlines.pop(run, None)
        row = self._concerned(run)
        if row is not None and not row.followed:
            self._engine.request(lambda: self._engine.book.followed(run))

    def left(self, run: int) -> None:
        """See Audience."""
        if not self._engine.hub.closing and self._concerned(run) is not None:
            self._set(run, self._grace)

    @property
    def deserted(self) -> int:
        """How many runs have been left alone, and will be cancelled unless somebody comes."""
        return len(self._deadlines)

    async def run(self) -> None:
        """Cancel what is due, until cancelled."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(min(self._deadlines.values(), default=float("inf"))):
                await self._changed.wait()
            now = trio.current_time()
            for run in [run for run, due in self._deadlines.items() if due <= now]:
                await self._end(run)

    def _set(self, run: int, seconds: float) -> None:
        self._deadlines[run] = trio.current_time() + seconds
        self._changed.set()

    def _concerned(self, run: int) -> RunRow | None:
        """Return an open run whose task wants to be cancelled; a task that has left the catalogue wants nothing."""
        row = self._engine.book.runs.get(run)
        if row is None or row.cancelling:
            return None
        try:
            task = self._engine.catalogue.find(row.task)
        except UnknownTask:
            return None
        return row if task.on_disconnect == "cancel" else None

    async def _end(self, run: int) -> None:
        self._deadlines.pop(run, None)
        if self._engine.hub.closing or self._concerned(run) is None:
            return
        try:
            self._engine.check_store()
            await self._engine.decide(lambda: self._cancel(run))
        except LifecycleError:
            return
        except NotWritable as error:
            logger.warning("a run that was left alone cannot be cancelled yet: %s", error)
            self._set(run, RETRY_SECONDS)

    def _cancel(self, run: int) -> None:
        row = self._concerned(run)
        if row is not None and not self._engine.hub.subscribers(run):
            logger.info("run %s is cancelled: nobody follows it any more", row.id)
            self._engine.book.cancel(
                row, self._engine.settings.limits.cancel_grace_seconds, time.time(), REASON
            )
