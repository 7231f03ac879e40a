"""Upkeep of the SQLite store: slices on the writer's thread, everything else beside it."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from gateway.store import retention, schema
from gateway.store.removal import Removal, Removed, RunLength, Usage
from gateway.store.rows import Opened
from gateway.store.writer import Checkpoint, Writer
from taskkit.identifiers import parse_run_id

if TYPE_CHECKING:
    from gateway.store.sqlite import SqliteStore

#: Events weighed in one read: about 5 ms, in which the WAL cannot start again.
_WEIGH_ROWS: Final = 20_000

#: Seconds between two such reads: what was there at the start is not urgent.
_WEIGH_PAUSE: Final = 0.02

#: Files looked up in one read.
_SWEEP_FILES: Final = 1_000


class SqliteUpkeep:
    """gateway.store.protocol.Upkeep of one SqliteStore."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._found: int | None = None  # bytes of events and lines that were there at the start
        self._ends = 0, 0

    def opened(self, found: Opened) -> None:
        """The store was opened; what was there before is weighed anew."""
        self._found = None
        self._ends = found.next_pos - 1, found.next_no - 1

    async def weigh(self) -> None:
        """See Upkeep. A line that an open run prints meanwhile may count twice: a little is trimmed too early."""
        total, position, run = 0, 0, 0
        last_event, last_run = self._ends
        look = self._store.look
        while position < last_event:
            size, position = await look(retention.weigh_events, position, last_event, _WEIGH_ROWS)
            total += size
            if not position:
                break
            await trio.sleep(_WEIGH_PAUSE)
        while (next_run := await look(retention.next_with_lines, run, last_run)) is not None:
            run = next_run
            total += await look(retention.weigh_lines, run)
        names = await look(retention.blobs_of_events)
        total += await trio.to_thread.run_sync(retention.sizes, self._store.blobs, names)
        self._found = total

    async def usage(self) -> Usage:
        """See Upkeep."""
        pages, size, free, incremental = await self._store.look(
            lambda connection: [
                int(connection.execute(f"PRAGMA {name}").fetchall()[0][0])
                for name in ("page_count", "page_size", "freelist_count", "auto_vacuum")
            ]
        )
        writer = self._store.writer
        wal = await trio.to_thread.run_sync(writer.wal_size)
        number, blob_bytes = await trio.to_thread.run_sync(_measure, self._store.blobs)
        return Usage(
            file=pages * size,
            wal=wal,
            free=free * size,
            events=None if self._found is None else max(0, self._found + writer.grown),
            blobs=number,
            blob_bytes=blob_bytes,
            incremental=incremental == 2,
        )

    async def remove(self, removal: Removal) -> Removed:
        """See Upkeep."""
        return await self._store.slice(lambda writer: writer.remove(removal))

    async def lengths(self, runs: Sequence[int], after: int, limit: int) -> list[RunLength]:
        """See Upkeep."""
        return await self._store.look(retention.lengths, runs, after, limit)

    async def note(self, key: str, value: str) -> None:
        """See Upkeep."""

        def note(writer: Writer) -> tuple[None, Checkpoint]:
            return None, writer.note(key, value)

        await self._store.slice(note)

    async def noted(self, key: str) -> str | None:
        """See Upkeep."""
        return await self._store.look(schema.get_meta, key)

    async def unlink(self, names: Sequence[str]) -> int:
        """See Upkeep. A file that is gone already has no bytes."""
        return await trio.to_thread.run_sync(_unlink, self._store.blobs, names)

    async def sweep(self, before: float) -> tuple[int, int]:
        """See Upkeep."""
        # First the attempts, then the files: an attempt that begins in between writes younger ones.
        oldest = await self._store.look(retention.oldest_open_attempt)
        before = before if oldest is None else min(before, oldest)
        return await self.drop(await trio.to_thread.run_sync(_older_files, self._store.blobs, before))

    async def large_values(self) -> list[str]:
        """See Upkeep."""
        return await trio.to_thread.run_sync(_older_files, self._store.blobs, math.inf)

    async def drop(self, names: Sequence[str]) -> tuple[int, int]:
        """See Upkeep."""
        number = size = 0
        for start in range(0, len(names), _SWEEP_FILES):
            orphans = await self._store.look(retention.unreferenced, names[start : start + _SWEEP_FILES])
            number += len(orphans)
            size += await self.unlink(orphans)
        return number, size

    async def vacuum(self, pages: int) -> int:
        """See Upkeep."""
        return await self._store.slice(lambda writer: writer.vacuum(pages))

    async def checkpoint(self) -> bool:
        """See Upkeep."""
        return await self._store.checkpoint()


@contextlib.contextmanager
def _entries(blobs: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    """Yield what is in the directory; nothing when somebody has removed it."""
    try:
        found = os.scandir(blobs)
    except FileNotFoundError:
        yield iter(())
        return
    with found:
        yield found


def _measure(blobs: Path) -> tuple[int, int]:
    number = size = 0
    with _entries(blobs) as entries:
        for entry in entries:
            try:
                size += entry.stat(follow_symlinks=False).st_size
            except OSError:  # gone meanwhile
                continue
            number += 1
    return number, size


def _older_files(blobs: Path, before: float) -> list[str]:
    """Return plain files under a UUID's name from before `before`; anything else is not ours to remove."""
    found = []
    with _entries(blobs) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if (
                parse_run_id(entry.name) == entry.name
                and stat.S_ISREG(status.st_mode)
                and status.st_mtime < before
            ):
                found.append(entry.name)
    return found


def _unlink(blobs: Path, names: Sequence[str]) -> int:
    size = 0
    for name in names:
        if parse_run_id(name) != name:  # the name came out of a runner: nothing outside the directory
            continue
        try:
            length = os.lstat(blobs / name).st_size
            os.unlink(blobs / name)
        except FileNotFoundError:
            continue
        size += length
    return size
