"""What open runs are told by others, kept until they end: every attempt hears all of it, from the first. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from gateway.store.rows import Batch, InputRow
from taskkit.errors import IdempotencyConflict, QueueFull

#: Inputs of one run, and bytes of their data: the gateway has them in memory while the run is open.
MOST: Final = 1_000
MOST_BYTES: Final = 4 * 1024 * 1024

#: What the names of inputs begin with that tell of another run's end; no client can choose one (gateway.telling.NAME).
ENDED: Final = "ended/"

#: Seconds after which to try again: the run may have ended by then.
_RETRY_SECONDS: Final = 60.0


class Inputs:
    """The inputs of all open runs.

    Args:
      rows: those that the store has, by run, then number.
    """

    def __init__(self, rows: Iterable[InputRow]) -> None:
        self._of: dict[int, list[InputRow]] = {}
        self._bytes: dict[int, int] = {}
        self._ends: dict[int, set[str]] = {}
        for row in rows:
            self._keep(row)

    def _keep(self, row: InputRow) -> None:
        self._of.setdefault(row.run, []).append(row)
        if row.name.startswith(ENDED):
            self._ends.setdefault(row.run, set()).add(row.name)
        self._bytes[row.run] = self._bytes.get(row.run, 0) + len(row.data)

    def of(self, run: int) -> Sequence[InputRow]:
        """Return what a run was told, oldest first."""
        return self._of.get(run, ())

    def add(
        self, run: int, name: str, data: bytes, key: str, now: float, batch: Batch
    ) -> tuple[InputRow, bool]:
        """Note that a run is told something; return it, and whether it was told that before (by the same key).

        Raises:
          IdempotencyConflict: the run was told something else with this key.
          QueueFull: it was told as much as is kept.
        """
        told = self.of(run)
        before = next((row for row in told if key and row.key == key), None)
        if before is not None:
            if (before.name, before.data) != (name, data):
                raise IdempotencyConflict("this Idempotency-Key was used with another body; use a new key")
            return before, True
        if (
            len(told) - len(self._ends.get(run, ())) >= MOST
            or self._bytes.get(run, 0) + len(data) > MOST_BYTES
        ):
            raise QueueFull(
                f"a run keeps {MOST:,} inputs of {MOST_BYTES:,} bytes in all until it ends, and this one has them",
                retry_after=_RETRY_SECONDS,
            )
        row = InputRow(run, len(told) + 1, name, data, key, now)
        self._keep(row)
        batch.inputs.append(row)
        return row, False

    def has_heard(self, run: int, name: str) -> bool:
        """Whether a run was told this by the gateway (`tell`)."""
        return name in self._ends.get(run, ())

    def room(self, run: int) -> int:
        """Return how many bytes more are kept for a run."""
        return max(0, MOST_BYTES - self._bytes.get(run, 0))

    def tell(self, run: int, name: str, data: bytes, now: float, batch: Batch) -> InputRow | None:
        """Note that the gateway itself tells an open run something; None: it has. Who tells it sees to the room."""
        if self.has_heard(run, name):
            return None
        row = InputRow(run, len(self.of(run)) + 1, name, data, "", now)
        self._keep(row)
        batch.inputs.append(row)
        return row

    def forget(self, run: int, batch: Batch) -> None:
        """A run has ended: nobody asks any more what it was told."""
        if self._of.pop(run, None):
            del self._bytes[run]
            self._ends.pop(run, None)
            batch.told_enough.append(run)
