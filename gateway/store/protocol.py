"""What any store must be able to do: one writer, one transaction a round, reads beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.store.removal import Removal, Removed, RunLength, Usage
from gateway.store.rows import (
    AttemptRow,
    Batch,
    EventRow,
    KeyRow,
    Mix,
    Opened,
    OutputRow,
    Place,
    RunFilter,
    RunRow,
)


class StoreError(Exception):
    """The store cannot be written or read now (disk full, read-only, I/O error). Try the same again later."""


class StoreTooNew(Exception):
    """A newer version of this program wrote the store. Trying again does not help."""


class Upkeep(Protocol):
    """What keeps a store from growing for ever, in pieces so small that commits do not notice.

    All methods raise StoreError when the disk does not answer; cancelled, a piece has either happened or not.
    """

    async def weigh(self) -> None:
        """Add up what was in the store when it was opened, beside its work; from then on `usage` knows `events`."""

    async def usage(self) -> Usage:
        """Return what the store takes of the disk."""

    async def remove(self, removal: Removal) -> Removed:
        """Take one slice out; `more` tells whether to come again."""

    async def lengths(self, runs: Sequence[int], after: int, limit: int) -> list[RunLength]:
        """Return the lengths of these runs, then of at most `limit` runs with a number > `after`, by number."""

    async def note(self, key: str, value: str) -> None:
        """Remember `value`; when this returns, a power cut brings nothing back that was taken out before."""

    async def noted(self, key: str) -> str | None:
        """Return what was remembered."""

    async def unlink(self, names: Sequence[str]) -> int:
        """Remove the files of large values that nothing refers to; return their bytes."""

    async def sweep(self, before: float) -> tuple[int, int]:
        """Remove large values from before `before` (Unix seconds) that nothing refers to and nothing can refer to
        any more: they are older than every open attempt. Returns (how many, bytes)."""

    async def large_values(self) -> list[str]:
        """Return the names of all large values that are there, referred to or not."""

    async def drop(self, names: Sequence[str]) -> tuple[int, int]:
        """Remove those of these large values that nothing refers to; return (how many, bytes). The caller knows that
        nothing can refer to them any more."""

    async def vacuum(self, pages: int) -> int:
        """Give up to `pages` free pages back to the disk; return how many are left."""

    async def checkpoint(self) -> bool:
        """Bring the file itself up to date, which makes it shorter after `vacuum`; return whether it is."""


class Store(Protocol):
    """Runs, attempts, events and output on disk.

    All methods are asynchronous and may be cancelled: `commit` then has either happened or not, reads have no
    effect. Every method raises StoreError when the disk does not answer.
    """

    @property
    def upkeep(self) -> Upkeep:
        """What retention works with."""

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

    async def runs_by_id(self, ids: Sequence[str]) -> dict[str, RunRow]:
        """Return those of the runs with these public ids that there are."""

    async def copies(self, ids: Sequence[str]) -> dict[str, RunRow]:
        """Return, by the public id that they had, the newest copies of those of these runs that are another node's."""

    async def runs(self, which: RunFilter) -> list[RunRow]:
        """Return the runs that `which` selects, newest first."""

    async def untold(self, after: int, limit: int) -> list[RunRow]:
        """Return at most `limit` runs with number > `after` of which Django does not have the newest version,
        oldest first."""

    async def run_of_row(self, row_key: str) -> RunRow | None:
        """Return the newest run of a task row."""

    async def attempts(self, run: int) -> list[AttemptRow]:
        """Return the attempts of a run that have begun, or may yet, oldest first."""

    async def events(self, run: int, after: int, limit: int, max_bytes: int) -> list[EventRow]:
        """Return events with offset > `after`, oldest first: at most `limit`, and at most `max_bytes` of data
        unless the first alone exceeds it."""

    async def places(self, mix: Mix, after: int, limit: int) -> tuple[list[Place], int | None]:
        """Return where a reader at position `after` stands in the runs of `mix` that are open, named, or have more for
        him; of ended ones with a tag at most `limit`, and then the position up to which no other one goes on."""

    async def merged(
        self, heads: Sequence[tuple[int, int]], upto: int, limit: int, max_bytes: int
    ) -> tuple[list[EventRow], int]:
        """Return the events that follow in runs, each with the offset it was read to, by position, up to position
        `upto`: at most `limit`, and at most `max_bytes` of data unless the first alone exceeds it. With them the
        position up to which that is all."""

    async def outputs(self, run: int, after: int, limit: int) -> list[OutputRow]:
        """Return output lines with offset > `after`, oldest first."""

    async def last_outputs(self, run: int, attempt: int, limit: int) -> list[OutputRow]:
        """Return the newest `limit` lines of one attempt, oldest first."""

    async def key(self, subject: str, key: str) -> KeyRow | None:
        """Return what an idempotency key was used for."""

    async def keys(self, subject: str, keys: Sequence[str]) -> dict[str, KeyRow]:
        """Return what those of a subject's idempotency keys were used for that were used."""

    async def blob(self, name: str) -> bytes:
        """Return the large value of that name in blobs/, such as a run's `result_blob`."""

    async def counts(self) -> dict[str, int]:
        """Return how many runs there are by status."""

    async def close(self) -> None:
        """Finish the commit under way, release the lock, close all connections."""
