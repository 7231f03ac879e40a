"""Tells whoever watches which runs have changed their state, after each commit.

Rule 1: publishing is synchronous and waits for nobody; a watcher that is too far behind is told that it has missed
something, and reads the runs anew.

Rule 2: a run that is accepted is published in any case. Who watches first and reads the store then knows every run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import trio

from gateway.store.rows import RunRow

#: Changes that wait for one watcher. At 1,000 runs a second, three changes each, that is a second and a half.
MAX_WAITING: Final = 5_000


class Watch:
    """What one watcher has not taken yet; a context manager. Rows are pictures: they do not change any more."""

    __slots__ = ("_changed", "_changes", "_missed", "_rows")

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._rows: deque[RunRow] = deque()
        self._missed = False
        self._changed = trio.lowlevel.ParkingLot()

    def __enter__(self) -> Self:
        self._changes._watches.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._changes._watches.discard(self)

    def take(self) -> tuple[list[RunRow], bool]:
        """Return the changes since the last call in their order, a run once for each, and whether some are missing.

        When some are, everything that waited has been dropped with them: read the store anew.
        """
        rows, missed = list(self._rows), self._missed
        self._rows.clear()
        self._missed = False
        return rows, missed

    async def wait(self) -> None:
        """Return when there is something to take, at once if there is already. The caller has a deadline."""
        if self._rows or self._missed:
            await trio.lowlevel.checkpoint()
            return
        await self._changed.park()

    def _put(self, rows: Sequence[RunRow]) -> None:
        if len(self._rows) + len(rows) > MAX_WAITING:
            self._rows.clear()
            self._missed = True
        else:
            self._rows.extend(rows)
        self._changed.unpark_all()


class Changes:
    """The changes of all runs of this gateway: accepted, started, retrying, cancelling, ended, …"""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()

    @property
    def watched(self) -> bool:
        """Whether anybody watches; otherwise pictures of changes need not be taken."""
        return bool(self._watches)

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._watches)

    def watch(self) -> Watch:
        """Return a watch, which sees what is published inside its `with` block."""
        return Watch(self)

    def publish(self, rows: Sequence[RunRow]) -> None:
        """Hand out committed changes; a run may be among them several times."""
        if rows:
            for watch in self._watches:
                watch._put(rows)
