"""The one connection that writes the store.

Everything here blocks; one thread at a time calls it. Errors are sqlite3's own; gateway.store.sqlite
translates.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

from gateway.store import schema
from gateway.store.events import insert_events
from gateway.store.removal import Removal, Removed
from gateway.store.retention import ROW_BYTES, Slices, sizes
from gateway.store.rows import MUTABLE, SPOKEN, Batch, EventRow, OutputRow, RunRow
from gateway.store.schema import (
    ATTEMPT_COLUMNS,
    BEGUN_COLUMNS,
    INPUT_COLUMNS,
    KEY_COLUMNS,
    OUTPUT_COLUMNS,
    REVOCATION_COLUMNS,
    RUN_COLUMNS,
    TICKET_COLUMNS,
    columns,
)
from taskkit import failpoints

logger = logging.getLogger(__name__)

#: WAL bytes after which a checkpoint beside the writer is due. SQLite's own default is the same.
PASSIVE_BYTES: Final = 4 * 1024 * 1024

#: WAL bytes after which the writer itself makes the WAL start again. A passive checkpoint can do that only
#: while nobody writes, so a store that is never idle would grow it for ever.
RESTART_BYTES: Final = 64 * 1024 * 1024

#: Largest file that is converted for incremental vacuum when it is opened, bytes: half a second of copying.
CONVERT_BYTES: Final = 64 * 1024 * 1024

#: What `PRAGMA auto_vacuum` says of a file that can give pages back (sqlite.org/pragma.html).
_INCREMENTAL: Final = 2

#: Seconds to wait for a lock of SQLite's. Only a person with the sqlite3 shell can hold one.
BUSY_SECONDS: Final = 2.0

#: KiB of page cache: the tail pages of the tables and the inner pages of the indexes, several times over.
_CACHE_KIB: Final = 8192

#: Positions left out after a power cut. More events than that cannot have been lost: at 50,000 a second they take five
#: hours. A million power cuts stay within what JavaScript counts exactly (2^53).
GAP: Final = 1_000_000_000

_ATTEMPT_MUTABLE: Final = ("started_at", "ended_at", "ending", "cause", "failure")


def _insert(table: str, names: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({columns(names)}) VALUES ({', '.join('?' * len(names))})"


def _update(table: str, names: Sequence[str], key: str) -> str:
    return f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in names)} WHERE {key} = ?"


_INSERT_RUN: Final = _insert("run", RUN_COLUMNS)
_UPDATE_RUN: Final = _update("run", MUTABLE, "no")
_UPDATE_SPOKEN: Final = _update("run", SPOKEN, "no")
_INSERT_TAG: Final = "INSERT OR IGNORE INTO tag (tag, run) VALUES (?, ?)"
_INSERT_ATTEMPT: Final = _insert("attempt", ATTEMPT_COLUMNS)
_UPDATE_ATTEMPT: Final = _update("attempt", _ATTEMPT_MUTABLE, "token")
_INSERT_OUTPUT: Final = _insert("output", OUTPUT_COLUMNS)
_INSERT_KEY: Final = _insert("idempotency", KEY_COLUMNS)
_INSERT_ENDING: Final = "INSERT INTO ending (run) VALUES (?)"
_UPSERT_SOURCE: Final = (
    "INSERT INTO source (runner, seq) VALUES (?, ?) ON CONFLICT (runner) DO UPDATE SET seq = excluded.seq"
)
_DELETE_SOURCE: Final = "DELETE FROM source WHERE runner = ?"
_UPSERT_BREAKER: Final = (
    "INSERT INTO breaker (task, record) VALUES (?, ?) "
    "ON CONFLICT (task) DO UPDATE SET record = excluded.record"
)
_DELETE_BREAKER: Final = "DELETE FROM breaker WHERE task = ?"
#: A ticket that only the store remembers would take a clock that was set back by an hour; it must not end the gateway.
_INSERT_TICKET: Final = _insert("ticket", TICKET_COLUMNS) + " ON CONFLICT DO NOTHING"
_UPSERT_REVOCATION: Final = (
    _insert("revocation", REVOCATION_COLUMNS)
    + " ON CONFLICT (kind, name) DO UPDATE SET at = excluded.at, expires_at = excluded.expires_at"
)
_INSERT_INPUT: Final = _insert("input", INPUT_COLUMNS)
_DELETE_INPUTS: Final = "DELETE FROM input WHERE run = ?"
_INSERT_BEGUN: Final = _insert("begun", BEGUN_COLUMNS)
_DELETE_BEGUN: Final = "DELETE FROM begun WHERE until <= ?"
_RENAME: Final = "UPDATE run SET id = ? WHERE no = ?"
_UPDATE_TOLD: Final = "UPDATE run SET told = ? WHERE no = ? AND told < ?"


class Step(NamedTuple):
    """One statement and its rows; `hits` is how many rows it must change, None when that is open."""

    sql: str
    rows: Iterable[tuple[Any, ...]]
    hits: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as it was at one moment: its rows can go on changing while another thread writes this."""

    steps: Sequence[Step]
    full: bool
    events: Sequence[EventRow] = ()
    outputs: Sequence[OutputRow] = ()

    def size(self, blobs: Path) -> int:
        """Return the bytes of its events and lines, as retention counts them."""
        rows = len(self.events) + len(self.outputs)
        return (
            sum([len(event.data) for event in self.events if event.blob is None])
            + sum([len(line.text) for line in self.outputs])
            + rows * ROW_BYTES
            + sizes(blobs, [event.blob for event in self.events if event.blob is not None])
        )


def _run_values(names: Sequence[str]) -> Callable[[RunRow], tuple[Any, ...]]:
    """Return what makes values of a run: 2 µs for a new one, where a look at every name took 9.

    SQLite's module takes an enumeration's member for a text, and a truth value for a number, but tags for nothing.
    """
    read, tags = attrgetter(*names), names.index("tags") if "tags" in names else None

    def values(run: RunRow) -> tuple[Any, ...]:
        found = read(run)
        if tags is not None:
            found = (*found[:tags], json.dumps(found[tags]) if found[tags] else "[]", *found[tags + 1 :])
        return found

    return values


_run_inserted = _run_values(RUN_COLUMNS)
_run_changes = _run_values((*MUTABLE, "no"))
_run_spoken = _run_values((*SPOKEN, "no"))


def _tag_values(run: RunRow) -> Iterator[tuple[str, int]]:
    for tag in run.tags:
        # Half a surrogate pair is no text to SQLite, and nobody can ask for one.
        yield tag.encode("utf-8", "replace").decode(), run.no


_attempt_values = attrgetter(*ATTEMPT_COLUMNS)
_attempt_changes = attrgetter(*_ATTEMPT_MUTABLE, "token")
_output_values = attrgetter(*OUTPUT_COLUMNS)
_key_values = attrgetter(*KEY_COLUMNS)
_ticket_values = attrgetter(*TICKET_COLUMNS)
_revocation_values = attrgetter(*REVOCATION_COLUMNS)
_input_values = attrgetter(*INPUT_COLUMNS)


def prepare(batch: Batch) -> Prepared:
    """Return what `batch` holds at this moment, as statements in their order.

    Rows that may change later (runs, attempts) are read here; events, outputs and keys are frozen, and what there is to
    be done with many of them is done in the writing thread.
    """
    # Changes come before new runs: a row's old run must have ended before its next one is inserted
    # (run_open_row).
    new = {run.no for run in batch.runs}
    changed = [_run_changes(run) for no, run in batch.changed.items() if no not in new]
    spoken = [
        _run_spoken(run) for no, run in batch.spoken.items() if no not in new and no not in batch.changed
    ]
    # One that has begun and ended within the round is written once.
    attempts = {row.token: row for row in batch.changed_attempts}.values()
    events, outputs = batch.events.copy(), batch.outputs.copy()
    steps = [
        Step(_UPDATE_RUN, changed, len(changed)),
        Step(_UPDATE_SPOKEN, spoken, len(spoken)),
        # Also before: the run may come back under its id.
        Step(_RENAME, [(id, no) for no, id in batch.renamed.items() if no not in new]),
        Step(_INSERT_RUN, [_run_inserted(run) for run in batch.runs]),
        Step(_INSERT_TAG, [values for run in batch.runs for values in _tag_values(run)]),
        Step(_INSERT_ATTEMPT, [_attempt_values(row) for row in batch.attempts]),
        Step(
            _UPDATE_ATTEMPT,
            [_attempt_changes(row) for row in attempts],
            len(attempts),
        ),
        Step(_INSERT_OUTPUT, map(_output_values, outputs) if outputs else ()),
        Step(_INSERT_ENDING, [(run,) for run in batch.ends]),
        Step(_UPSERT_SOURCE, list(batch.sources.items())),
        Step(_DELETE_SOURCE, [(runner,) for runner in batch.forgotten]),
        Step(_UPDATE_TOLD, [(version, no, version) for no, version in batch.told.items()]),
        Step(_INSERT_KEY, [_key_values(row) for row in batch.keys]),
        Step(_UPSERT_BREAKER, [(task, record) for task, record in batch.breakers.items() if record]),
        Step(_DELETE_BREAKER, [(task,) for task, record in batch.breakers.items() if not record]),
        Step(_INSERT_TICKET, [_ticket_values(row) for row in batch.tickets]),
        Step(_UPSERT_REVOCATION, [_revocation_values(row) for row in batch.revocations]),
        Step(_INSERT_INPUT, [_input_values(row) for row in batch.inputs]),
        Step(_DELETE_INPUTS, [(run,) for run in batch.told_enough]),
        Step(_INSERT_BEGUN, batch.begun.copy()),
        Step(_DELETE_BEGUN, [] if batch.begun_before is None else [(batch.begun_before,)]),
    ]
    return Prepared([step for step in steps if step.rows], batch.full, events, outputs)


class Checkpoint(enum.Enum):
    """What the WAL needs after a commit."""

    NONE = enum.auto()
    #: copy what can be copied, beside the writer
    PASSIVE = enum.auto()
    #: the writer has to pause until the WAL can start again
    RESTART = enum.auto()


class WalGauge:
    """Decides from the size of the WAL when a checkpoint is due.

    One decision per PASSIVE_BYTES of growth: a reader that pins the WAL does not cause a checkpoint per
    commit. The file's size is what is in use, because `journal_size_limit = 0` cuts the file when it starts
    again.
    """

    def __init__(self, passive: int = PASSIVE_BYTES, restart: int = RESTART_BYTES) -> None:
        self.passive = passive
        self.restart = restart
        self._decided_at = 0

    def decide(self, size: int) -> Checkpoint:
        """Return what is due when the WAL has `size` bytes."""
        if size < self._decided_at:
            self._decided_at = 0
        if size - self._decided_at < self.passive:
            return Checkpoint.NONE
        self._decided_at = size
        return Checkpoint.PASSIVE if size < self.restart else Checkpoint.RESTART


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection for any thread, one at a time, that leaves transactions to the caller."""
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


class Writer:
    """Writes batches, each in one transaction.

    Args:
      path: the database file; made when it does not exist.
      boot_id: the kernel's name for the time since the last boot.
      durability: "power": every commit survives a power cut; "process": those with `full` do, and of the
        others a prefix does. Both survive the death of any process.
    """

    def __init__(self, path: Path, *, boot_id: str, durability: str) -> None:
        self.gauge = WalGauge()
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._blobs = path.with_name("blobs")
        self._always_full = durability == "power"
        self._synchronous = ""
        # SQLite gives -wal and -shm the mode of the database: private to its user.
        path.touch(mode=0o600)
        self.connection = connect(path)
        self.slices = Slices(self.connection, self._blobs)
        #: bytes of events and lines written by this object, less what its slices took out
        self.grown = 0
        try:
            self._prepare_file(boot_id, durability)
            self._files = self._identity()
        except BaseException:
            self.connection.close()
            raise

    def _prepare_file(self, boot_id: str, durability: str) -> None:
        # Before the first page is written: later it would take a VACUUM.
        self.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for setting in ("journal_mode = WAL", "wal_autocheckpoint = 0", "journal_size_limit = 0"):
            self.connection.execute(f"PRAGMA {setting}").fetchall()
        self.connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._set_synchronous(full=True)
        schema.migrate(self.connection)
        self._make_incremental()
        with self._transaction():
            self._note_boot(boot_id, durability)

    @property
    def incremental(self) -> bool:
        """Whether free pages can be given back piece by piece."""
        return int(self.connection.execute("PRAGMA auto_vacuum").fetchall()[0][0]) == _INCREMENTAL

    def _make_incremental(self) -> None:
        """Convert a file that was made without `auto_vacuum`, while nobody waits; a large one stays as it is."""
        if self.incremental:
            return
        pages, size = (
            self.connection.execute(f"PRAGMA {name}").fetchall()[0][0] for name in ("page_count", "page_size")
        )
        if pages * size > CONVERT_BYTES:
            logger.warning(
                "the store has %d MiB and was made by an older version: its free pages are used again, but "
                "cannot be given back to the disk while it is open",
                pages * size // 2**20,
            )
            return
        try:
            self.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.connection.execute("VACUUM")
            self.restart_wal()  # it has written the whole file into the WAL
        except sqlite3.OperationalError as error:  # it works as before, and the next start tries again
            logger.warning("the store's file could not be converted: %s", error)

    def _note_boot(self, boot_id: str, durability: str) -> None:
        # After a power cut the newest events of an open run may be missing, and their offsets are given out
        # again. A new epoch tells a cursor of before. Nothing can be missing after a clean end (`close`
        # leaves ""), under durability "power", or when the same kernel still runs.
        #
        # What is missing is missing whole: SQLite's WAL is recovered up to the first frame that does not fit
        # its running checksum, so a prefix of the transactions survives (sqlite.org/wal.html). A run's `tail`
        # and its events are of one transaction: they agree, whatever else is lost. A run that has ended was
        # committed FULL, and so was everything in front of it.
        before = schema.get_meta(self.connection, "boot_id")
        if before and before != boot_id and schema.get_meta(self.connection, "durability") != "power":
            self.connection.execute("UPDATE run SET epoch = epoch + 1 WHERE status IN ('READY', 'RUNNING')")
            self._leave_gap()
        schema.set_meta(self.connection, "boot_id", boot_id)
        schema.set_meta(self.connection, "durability", durability)

    def _leave_gap(self) -> None:
        """Go on at a position that no lost event can have had, and remember where: a cursor in between is stale.

        What is left is a prefix here, too: a cursor up to the newest event that is left has seen nothing else.
        """
        found = self.connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'").fetchall()
        low = int(found[0][0]) if found else 0
        if found:
            self.connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'event'", (low + GAP,))
        else:
            self.connection.execute("INSERT INTO sqlite_sequence VALUES ('event', ?)", (low + GAP,))
        gaps = [*schema.get_gaps(self.connection), (low, low + GAP)]
        schema.set_meta(self.connection, "gaps", json.dumps(gaps))

    def _set_synchronous(self, *, full: bool) -> None:
        level = "FULL" if full or self._always_full else "NORMAL"
        if level != self._synchronous:
            self.connection.execute(f"PRAGMA synchronous = {level}")
            self._synchronous = level

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if self.connection.in_transaction:  # the last rollback failed, too
            self.connection.execute("ROLLBACK")
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite rolls back by itself after some errors
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
            raise

    def _take(self, step: Step) -> None:
        changed = self.connection.executemany(step.sql, step.rows).rowcount
        if step.hits is not None and changed != step.hits:
            raise LookupError(f"{changed} of {step.hits} rows exist for: {step.sql}")

    def commit(self, prepared: Prepared) -> Checkpoint:
        """Write all of it or nothing; return which checkpoint is due.

        Raises:
          sqlite3.OperationalError, sqlite3.DatabaseError: the disk; the same batch can be written later.
          sqlite3.IntegrityError, LookupError: the caller's bug: a second `stream.end`, an offset used before,
            a change of a run or an attempt that does not exist.
        """
        self._check_files()
        self._set_synchronous(full=prepared.full)
        with self._transaction():
            for step in prepared.steps:
                self._take(step)
            insert_events(self.connection, prepared.events)
            failpoints.hit("store.commit")
        self.grown += prepared.size(self._blobs)
        return self.gauge.decide(self.wal_size())

    def _identity(self) -> list[tuple[int, int]]:
        """Return which files the names stand for now. By stat, never by open (see `wal_size`)."""
        return [(found.st_dev, found.st_ino) for found in (os.stat(self._path), os.stat(self._wal))]

    def _check_files(self) -> None:
        """Refuse to write into files that somebody has removed or replaced: they end with this process (3 µs).

        Raises:
          sqlite3.OperationalError: their names stand for others, or for none.
        """
        try:
            same = self._identity() == self._files
        except FileNotFoundError:
            same = False
        if not same:
            raise sqlite3.OperationalError(
                f"{self._path} was removed or replaced while it was open: put the files back that were there, or "
                "`bulkhead restart --gateway` to go on with what lies there now"
            )

    def remove(self, removal: Removal) -> tuple[Removed, Checkpoint]:
        """Take one slice of `removal` out, in a transaction of its own.

        It need not survive a power cut: what comes back is taken out again. Files of large values may go only
        after a commit that does (`note`).
        """
        self._set_synchronous(full=False)
        position = self.slices.position
        try:
            with self._transaction():
                removed = self.slices.take(removal)
        except BaseException:
            self.slices.position = position
            raise
        self.grown -= removed.size
        return removed, self.gauge.decide(self.wal_size())

    def vacuum(self, pages: int) -> tuple[int, Checkpoint]:
        """Give up to `pages` free pages back; return how many free ones are left."""
        self._set_synchronous(full=False)
        with self._transaction():
            for _ in range(min(pages, self.free_pages())):
                # One at a time: the module resets a statement without columns after its first page.
                self.connection.execute("PRAGMA incremental_vacuum(1)").fetchall()
        return self.free_pages(), self.gauge.decide(self.wal_size())

    def free_pages(self) -> int:
        """Return how many pages of the file hold nothing."""
        return int(self.connection.execute("PRAGMA freelist_count").fetchall()[0][0])

    def note(self, key: str, value: str) -> Checkpoint:
        """Write one value of `meta`; when this returns, a power cut loses nothing that was written before."""
        self._set_synchronous(full=True)
        with self._transaction():
            schema.set_meta(self.connection, key, value)
        return self.gauge.decide(self.wal_size())

    def wal_size(self) -> int:
        """Return the bytes of the WAL that are in use."""
        # By stat, never by open: closing any descriptor of the file would drop the locks SQLite has on it
        # (fcntl(2)).
        try:
            return self._wal.stat().st_size
        except FileNotFoundError:
            return 0

    def restart_wal(self) -> bool:
        """Copy the whole WAL into the database and let it start again; return whether that was possible.

        Waits for readers up to BUSY_SECONDS.
        """
        return checkpoint(self.connection, "RESTART")

    def close(self) -> None:
        """Put everything on the disk itself and close the connection."""
        try:
            self._set_synchronous(full=True)
            with self._transaction():
                schema.set_meta(self.connection, "boot_id", "")
        finally:
            self.connection.close()


def checkpoint(connection: sqlite3.Connection, mode: str = "PASSIVE") -> bool:
    """Copy the WAL into the database; return whether nothing is left in it that is not copied."""
    busy, in_wal, copied = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()[0]
    return not busy and in_wal == copied
