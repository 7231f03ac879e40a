"""What any store must be able to do: one writer, one transaction a round, reads beside it."""

from __future__ import annotations

from typing import Protocol

from gateway.store.rows import AttemptRow, Batch, EventRow, KeyRow, Opened, OutputRow, RunFilter, RunRow


class StoreError(Exception):
    """The store cannot be written or read now (disk full, read-only, I/O error). Try the same again later."""


class Store(Protocol):
    """Runs, attempts, events and output on disk.

    All methods are asynchronous and may be cancelled: `commit` then has either happened or not, reads have no
    effect. Every method raises StoreError when the disk does not answer.
    """

    async def open(self) -> Opened:
        """Take the write lock, make or migrate the schema, return what is open.

        Raises:
          StoreError: another process holds the lock.
        """

    async def commit(self, batch: Batch) -> None:
        """Write `batch` in one transaction; when it returns, a SIGKILL of everything loses nothing of it.

        Not for two tasks at once. Committing a batch again that was committed (the answer was lost) is an error
        of the caller; a batch that raised StoreError was not written at all.
        """

    async def run(self, id: str) -> RunRow | None:
        """Return the run with this public id."""

    async def runs(self, which: RunFilter) -> list[RunRow]:
        """Return the runs that `which` selects, newest first."""

    async def run_of_row(self, row_key: str) -> RunRow | None:
        """Return the newest run of a task row."""

    async def attempts(self, run: int) -> list[AttemptRow]:
        """Return the attempts of a run that have begun, or may yet, oldest first."""

    async def events(self, run: int, after: int, limit: int, max_bytes: int) -> list[EventRow]:
        """Return events with offset > `after`, oldest first: at most `limit`, and at most `max_bytes` of data
        unless the first alone exceeds it."""

    async def outputs(self, run: int, after: int, limit: int) -> list[OutputRow]:
        """Return output lines with offset > `after`, oldest first."""

    async def last_outputs(self, run: int, attempt: int, limit: int) -> list[OutputRow]:
        """Return the newest `limit` lines of one attempt, oldest first."""

    async def key(self, subject: str, key: str) -> KeyRow | None:
        """Return what an idempotency key was used for."""

    async def blob(self, name: str) -> bytes:
        """Return the large value of that name in blobs/, such as a run's `result_blob`."""

    async def counts(self) -> dict[str, int]:
        """Return how many runs there are by status."""

    async def close(self) -> None:
        """Finish the commit under way, release the lock, close all connections."""
