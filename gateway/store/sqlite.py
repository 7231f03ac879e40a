"""The store over one SQLite file: one writing thread, a few reading ones."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
import trio

from gateway.store import mixing, reads
from gateway.store.protocol import StoreError
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
from gateway.store.serial import SerialThread
from gateway.store.upkeep import SqliteUpkeep
from gateway.store.writer import BUSY_SECONDS, Checkpoint, Writer, checkpoint, connect, prepare

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Reads at once. They take microseconds to a few milliseconds: more threads gain nothing.
READERS: Final = 4

#: Seconds that `close` waits for the commit and the checkpoint under way. 64 MiB of WAL
#: take 5 s on a disk of 13 MB/s. A kill afterwards loses nothing.
CLOSE_SECONDS: Final = 10.0

#: Seconds that `checkpoint` waits.
CHECKPOINT_SECONDS: Final = 10.0


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turn what the disk does into StoreError; bugs of ours (IntegrityError …) pass as they are."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        if isinstance(error, sqlite3.DatabaseError) and type(error) not in (
            sqlite3.OperationalError,
            sqlite3.DatabaseError,
        ):
            raise
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise StoreError(f"the store does not answer: {error} ({name})") from error


class _Lock:
    """Holds `path` against every other process, until closed or dead. Never inherited: close-on-exec."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(path)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(self._fd, 200, 0))
            raise StoreError(f"process {holder} has the store open: {path} is locked") from None
        os.ftruncate(self._fd, 0)
        # With the start time: whoever has to end a gateway that was left behind must not end another process
        # that has its number by now.
        record = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        os.pwrite(self._fd, json.dumps(record).encode() + b"\n", 0)

    def close(self) -> None:
        """Release it. The file stays: removing it would let two processes lock two files of one name."""
        os.close(self._fd)


def _holder(record: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(record)["pid"])
    return "unknown"


class _Readers:
    """Reading connections, each used by one thread at a time. Not bounded itself: its caller's limiter is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
            if self._idle:
                return self._idle.pop()
        connection = connect(self._path)
        connection.execute("PRAGMA query_only = 1")
        return connection

    def use(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what `function` makes of a connection."""
        connection = self._take()
        try:
            result = function(connection)
        except BaseException:
            connection.close()  # whatever it was, the next read begins afresh
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return result
        connection.close()
        return result

    def close(self) -> None:
        """Close what is idle; a connection in use is closed by its read."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


@dataclass(slots=True)
class _Parts:
    """What an open store consists of. `cleanup` closes it all, the lock last."""

    writer: Writer
    checkpointer: sqlite3.Connection
    readers: _Readers
    cleanup: contextlib.ExitStack
    checkpointing: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def passive_checkpoint(self) -> bool:
        """Copy what can be copied beside the writer; return whether all of it was."""
        with self.checkpointing, _store_errors():
            return not self.closed and checkpoint(self.checkpointer)

    def restart_wal(self) -> bool:
        """Have the writer make the WAL start again; return whether that was possible.

        SQLite refuses at once while another checkpoint is under way (sqlite.org/c3ref/wal_checkpoint_v2.html), so
        that one is waited for: it copies what this one would have to copy.
        """
        if not self.checkpointing.acquire(timeout=BUSY_SECONDS):
            return False
        try:
            return not self.closed and self.writer.restart_wal()
        finally:
            self.checkpointing.release()

    def close(self) -> None:
        """Wait for a checkpoint under way, then close everything."""
        with self.checkpointing, _store_errors():
            self.closed = True
            self.cleanup.close()


class SqliteStore:
    """gateway.store.protocol.Store in `directory`: store.sqlite3, store.lock, blobs/.

    Commits go through one thread, in their order, and are never abandoned: cancelled before it began, a
    commit has not happened; later it completes and the call returns. Reads run in threads beside it, each on
    a snapshot of its own, and can be cancelled at any time.

    Args:
      directory: the state directory; made, private to its user, when it does not exist.
      boot_id: the kernel's name for the time since the last boot.
      durability: "process" or "power" (every commit survives a power cut).
    """

    def __init__(self, directory: Path, *, boot_id: str, durability: str = "process") -> None:
        self.directory = directory
        self.blobs = directory / "blobs"
        self._boot_id = boot_id
        self._durability = durability
        self._parts: _Parts | None = None
        self.upkeep = SqliteUpkeep(self)
        self._read_limit = trio.CapacityLimiter(READERS)

    async def open(self) -> Opened:
        """Take the write lock, make or migrate the schema, return what is open.

        Not cancellable once begun. After a StoreError it can be tried again.

        Raises:
          StoreError: another process holds the lock (the message names it), or the disk does not answer.
          StoreTooNew: a newer version wrote the store.
        """
        if self._parts is not None:
            raise StoreError("the store is open already")
        self._writer_thread = SerialThread("store-writer")
        self._checkpoint_thread = SerialThread("store-checkpoint")
        try:
            self._parts, found = await self._writer_thread.run(self._open)
        except BaseException:
            self._stop_threads()
            raise
        return found

    def _stop_threads(self) -> None:
        self._writer_thread.stop()
        self._checkpoint_thread.stop()

    def _open(self) -> tuple[_Parts, Opened]:
        path = self.directory / "store.sqlite3"
        with _store_errors(), contextlib.ExitStack() as cleanup:
            self.blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
            cleanup.callback(_Lock(self.directory / "store.lock").close)
            writer = Writer(path, boot_id=self._boot_id, durability=self._durability)
            cleanup.callback(writer.close)
            checkpointer = connect(path)
            cleanup.callback(checkpointer.close)
            # A connection that has read nothing may not know of the WAL yet, and would find nothing to copy.
            checkpointer.execute("SELECT count(*) FROM meta").fetchall()
            found = reads.opened(writer.connection)
            self.upkeep.opened(found)
            readers = _Readers(path)
            cleanup.callback(readers.close)
            return _Parts(writer, checkpointer, readers, cleanup.pop_all()), found

    def _require(self) -> _Parts:
        if self._parts is None:
            raise StoreError("the store is not open")
        return self._parts

    async def commit(self, batch: Batch) -> None:
        """Write `batch` in one transaction; when it returns, a SIGKILL of everything loses nothing of it.

        What counts is the batch at the moment of the call. Cancelled before it began, nothing was written;
        after that it completes and returns.

        Raises:
          StoreError: the disk; nothing was written, the same batch can be committed later.
          sqlite3.IntegrityError, LookupError: a bug of the caller's (a second `stream.end` of a run, an
            offset used before, a change of what does not exist); nothing was written.
        """
        parts = self._require()
        if not batch:
            await trio.lowlevel.checkpoint()
            return
        with _store_errors():
            due = await self._writer_thread.run(functools.partial(parts.writer.commit, prepare(batch)))
        self._checkpoint_if(due, parts)

    def _checkpoint_if(self, due: Checkpoint, parts: _Parts) -> None:
        if due is Checkpoint.RESTART:
            self._writer_thread.submit(parts.restart_wal)
        elif due is Checkpoint.PASSIVE and not parts.checkpointing.locked():
            self._checkpoint_thread.submit(parts.passive_checkpoint)

    async def checkpoint(self) -> bool:
        """Copy the WAL into the database beside the writer; return whether nothing is left to copy.

        Gives up waiting, with False, after CHECKPOINT_SECONDS. Then, and when cancelled, the copying goes on.

        Raises:
          StoreError: the disk does not answer.
        """
        parts = self._require()
        with trio.move_on_after(CHECKPOINT_SECONDS):
            return await self._checkpoint_thread.run(parts.passive_checkpoint, abandon_on_cancel=True)
        return False

    async def _read(self, function: Callable[..., _T], *values: Any) -> _T:
        readers = self._require().readers
        with _store_errors():
            return await trio.to_thread.run_sync(
                readers.use,
                lambda connection: function(connection, *values),
                abandon_on_cancel=True,
                limiter=self._read_limit,
            )

    @property
    def writer(self) -> Writer:
        """The writer, for a look at its counters; only `slice` has it do something.

        Raises:
          StoreError: the store is not open.
        """
        return self._require().writer

    async def slice(self, function: Callable[[Writer], tuple[_T, Checkpoint]]) -> _T:
        """Have `function` write between two commits; return what it made. Commits wait: keep it to milliseconds.

        Raises:
          StoreError: the disk; nothing was written.
        """
        parts = self._require()
        with _store_errors():
            found, due = await self._writer_thread.run(lambda: function(parts.writer))
        self._checkpoint_if(due, parts)
        return found

    async def look(self, function: Callable[..., _T], *values: Any) -> _T:
        """Return what `function(connection, *values)` reads, in a thread beside the writer.

        Raises:
          StoreError: the disk does not answer.
        """
        return await self._read(function, *values)

    async def untold(self, after: int, limit: int) -> list[RunRow]:
        """Return at most `limit` runs with number > `after` of which Django does not have the newest version."""
        return await self._read(reads.untold, after, limit)

    async def run(self, id: str) -> RunRow | None:
        """Return the run with this public id."""
        return await self._read(reads.run, id)

    async def runs_by_id(self, ids: Sequence[str]) -> dict[str, RunRow]:
        """Return those of the runs with these public ids that there are."""
        return await self._read(reads.runs_by_id, ids)

    async def copies(self, ids: Sequence[str]) -> dict[str, RunRow]:
        """Return the newest copies of those of these runs that are another node's now (gateway.store.reads)."""
        return await self._read(reads.copies, ids)

    async def runs(self, which: RunFilter) -> list[RunRow]:
        """Return the runs that `which` selects, newest first (see gateway.store.reads.runs)."""
        return await self._read(reads.runs, which)

    async def run_of_row(self, row_key: str) -> RunRow | None:
        """Return the newest run of a task row."""
        return await self._read(reads.run_of_row, row_key)

    async def attempts(self, run: int) -> list[AttemptRow]:
        """Return the attempts of a run, oldest first."""
        return await self._read(reads.attempts, run)

    async def events(self, run: int, after: int, limit: int, max_bytes: int) -> list[EventRow]:
        """Return events with offset > `after`, oldest first: at most `limit`, and at most `max_bytes` of data
        unless the first alone exceeds it. `data` is filled in from blobs/ as well."""
        return await self._read(reads.events, self.blobs, run, after, limit, max_bytes)

    async def places(self, mix: Mix, after: int, limit: int) -> tuple[list[Place], int | None]:
        """Return where a reader at position `after` stands in many runs (see gateway.store.mixing.places)."""
        return await self._read(mixing.places, mix, after, limit)

    async def merged(
        self, heads: Sequence[tuple[int, int]], upto: int, limit: int, max_bytes: int
    ) -> tuple[list[EventRow], int]:
        """Return the events that follow in many runs (see gateway.store.mixing.merged)."""
        return await self._read(mixing.merged, self.blobs, heads, upto, limit, max_bytes)

    async def outputs(self, run: int, after: int, limit: int) -> list[OutputRow]:
        """Return output lines with offset > `after`, oldest first."""
        return await self._read(reads.outputs, run, after, limit)

    async def last_outputs(self, run: int, attempt: int, limit: int) -> list[OutputRow]:
        """Return the newest `limit` lines of one attempt, oldest first."""
        return await self._read(reads.last_outputs, run, attempt, limit)

    async def key(self, subject: str, key: str) -> KeyRow | None:
        """Return what an idempotency key was used for."""
        return await self._read(reads.key, subject, key)

    async def keys(self, subject: str, keys: Sequence[str]) -> dict[str, KeyRow]:
        """Return what those of a subject's idempotency keys were used for that were used."""
        return await self._read(reads.keys, subject, keys)

    async def blob(self, name: str) -> bytes:
        """Return the large value of that name, or a JSON marker when the file is gone."""
        with _store_errors():
            return await trio.to_thread.run_sync(reads.read_blob, self.blobs, name, abandon_on_cancel=True)

    async def counts(self) -> dict[str, int]:
        """Return how many runs there are by status, zeros included."""
        return await self._read(reads.counts)

    async def close(self) -> None:
        """Finish the commit under way, release the lock, close all connections.

        Works when cancelled, and a second time. When the disk does not let it finish within CLOSE_SECONDS it
        returns all the same; the lock then ends with the process. Reads under way finish by themselves.
        """
        parts, self._parts = self._parts, None
        if parts is None:
            return
        try:
            with trio.move_on_after(CLOSE_SECONDS, shield=True), contextlib.suppress(StoreError):
                await self._writer_thread.run(parts.close, abandon_on_cancel=True)
        finally:
            self._stop_threads()
