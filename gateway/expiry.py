"""Which runs wait too long to be started. Pure; time is Unix seconds, as `run_after` is."""

from __future__ import annotations

import heapq
from typing import Final

from gateway.store.rows import RunRow
from taskkit.identifiers import run_id_time

#: Entries of runs that no longer wait, beyond which it pays to sweep.
_SLACK: Final = 1_000


class Expiry:
    """When waiting runs with a `schedule_timeout` expire.

    It counts from the submission, or from `run_after`, until the first attempt begins: a run that waits for its next
    attempt has been started.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._waiting: set[int] = set()

    def add(self, run: RunRow) -> None:
        """A run waits, for the first time or once more."""
        if run.schedule_timeout is None or run.started_at is not None or run.no in self._waiting:
            return
        self._waiting.add(run.no)
        # What was submitted while no tree was there has waited since then.
        since = max(min(run.created_at, run_id_time(run.id)), run.run_after or 0.0)
        heapq.heappush(self._heap, (since + run.schedule_timeout, run.no))

    def remove(self, no: int) -> None:
        """A run waits no longer."""
        self._waiting.discard(no)
        if len(self._heap) > 2 * len(self._waiting) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """Return when the next run expires."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[int]:
        """Take out and return the numbers of those that have waited too long."""
        due = []
        while (at := self.next()) is not None and at <= now:
            no = heapq.heappop(self._heap)[1]
            self._waiting.discard(no)
            due.append(no)
        return due
