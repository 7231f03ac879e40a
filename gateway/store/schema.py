"""The tables of the store, as the steps that lead from an empty file to them.

Rule: a step that was ever released is never edited; a change is a new step at the end. The number of steps a
file has taken stands in its `meta` table under "schema".
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Final

from gateway.store.protocol import StoreTooNew
from gateway.store.rows import (
    AttemptRow,
    BegunRow,
    EventRow,
    InputRow,
    KeyRow,
    OutputRow,
    RevocationRow,
    RunRow,
    TicketRow,
)

RUN_COLUMNS: Final = tuple(field.name for field in fields(RunRow))
ATTEMPT_COLUMNS: Final = tuple(field.name for field in fields(AttemptRow))
EVENT_COLUMNS: Final = EventRow._fields
OUTPUT_COLUMNS: Final = tuple(field.name for field in fields(OutputRow))
KEY_COLUMNS: Final = tuple(field.name for field in fields(KeyRow))
TICKET_COLUMNS: Final = tuple(field.name for field in fields(TicketRow))
REVOCATION_COLUMNS: Final = tuple(field.name for field in fields(RevocationRow))
INPUT_COLUMNS: Final = tuple(field.name for field in fields(InputRow))
BEGUN_COLUMNS: Final = BegunRow._fields

#: AUTOINCREMENT where a number must never be given out twice, even when retention has removed the newest row:
#: `no` stands in every other table, `pos` is a cursor of multiplexed streams. Measured: no difference per
#: commit.
_FIRST: Final = (
    """CREATE TABLE run (
        no INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        task TEXT NOT NULL,
        args BLOB NOT NULL,
        kwargs BLOB NOT NULL,
        row BLOB,
        row_key TEXT,
        pool TEXT NOT NULL,
        priority INTEGER NOT NULL,
        run_after REAL,
        timeout REAL,
        max_attempts INTEGER NOT NULL,
        on_lost TEXT NOT NULL,
        metadata BLOB NOT NULL,
        tags TEXT NOT NULL,
        subject TEXT NOT NULL,
        origin TEXT NOT NULL,
        "using" TEXT NOT NULL,
        created_at REAL NOT NULL,
        status TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        counted INTEGER NOT NULL,
        version INTEGER NOT NULL,
        told INTEGER NOT NULL,
        tail INTEGER NOT NULL,
        lines INTEGER NOT NULL,
        started_at REAL,
        finished_at REAL,
        result BLOB,
        result_blob TEXT,
        error BLOB,
        progress BLOB,
        cancelling INTEGER NOT NULL,
        epoch INTEGER NOT NULL DEFAULT 0
    )""",
    # An index ends with the row's number, so these two also serve "newest first". The first one finds the
    # open runs and makes counting them a walk over the index alone.
    "CREATE INDEX run_by_status ON run (status)",
    "CREATE INDEX run_by_task ON run (task)",
    "CREATE INDEX run_by_row ON run (row_key) WHERE row_key IS NOT NULL",
    """CREATE UNIQUE INDEX run_open_row ON run (row_key)
        WHERE row_key IS NOT NULL AND status IN ('READY', 'RUNNING')""",
    "CREATE INDEX run_untold ON run (no) WHERE version > told",
    """CREATE TABLE attempt (
        token TEXT PRIMARY KEY,
        run INTEGER NOT NULL,
        number INTEGER NOT NULL,
        runner TEXT NOT NULL,
        pid INTEGER NOT NULL,
        assigned_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        ending TEXT,
        cause BLOB,
        failure BLOB
    )""",
    # An attempt whose runner died before it began did not happen: the next one has its number.
    "CREATE UNIQUE INDEX attempt_number ON attempt (run, number) WHERE started_at IS NOT NULL",
    "CREATE INDEX attempt_open ON attempt (run, number) WHERE ending IS NULL",
    """CREATE TABLE event (
        pos INTEGER PRIMARY KEY AUTOINCREMENT,
        run INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        type TEXT NOT NULL,
        data BLOB NOT NULL,
        at REAL NOT NULL,
        blob TEXT,
        UNIQUE (run, "offset")
    )""",
    """CREATE TABLE output (
        run INTEGER NOT NULL,
        "offset" INTEGER NOT NULL,
        "after" INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        stream TEXT NOT NULL,
        text TEXT NOT NULL,
        at REAL NOT NULL,
        level TEXT NOT NULL,
        logger TEXT NOT NULL,
        PRIMARY KEY (run, "offset")
    ) WITHOUT ROWID""",
    "CREATE TABLE source (runner TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE ending (run INTEGER PRIMARY KEY)",
    """CREATE TABLE idempotency (
        subject TEXT NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        run TEXT NOT NULL,
        created_at REAL NOT NULL,
        PRIMARY KEY (subject, key)
    ) WITHOUT ROWID""",
)

#: Crash loops: what a run has killed, whom a replay replaces, which tasks are held back.
_CRASHES: Final = (
    "ALTER TABLE run ADD COLUMN replay_of TEXT",
    "ALTER TABLE run ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE run ADD COLUMN suspect INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX run_replay ON run (replay_of) WHERE replay_of IS NOT NULL",
    # The number is taskkit.lifecycle.QUARANTINE_AFTER; here it only keeps the index small.
    "CREATE INDEX run_crashed ON run (no) WHERE status = 'FAILED' AND crashes >= 3",
    "CREATE TABLE breaker (task TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID",
)

#: Retention: each thing that can be due is found by an index, so that a look that finds nothing costs
#: microseconds however much is kept.
_RETENTION: Final = (
    "ALTER TABLE run ADD COLUMN result_expired INTEGER NOT NULL DEFAULT 0",
    # Only what Django has been told of may go.
    "CREATE INDEX run_done ON run (finished_at) WHERE finished_at IS NOT NULL AND version <= told",
    """CREATE INDEX run_done_result ON run (finished_at) WHERE finished_at IS NOT NULL AND version <= told
        AND (result IS NOT NULL OR result_blob IS NOT NULL)""",
    "CREATE INDEX run_blob ON run (result_blob) WHERE result_blob IS NOT NULL",
    "CREATE INDEX attempt_by_run ON attempt (run)",
    "CREATE INDEX event_blob ON event (blob) WHERE blob IS NOT NULL",
    "CREATE INDEX output_by_age ON output (at)",
    "CREATE INDEX key_by_run ON idempotency (run)",
    "CREATE INDEX key_by_age ON idempotency (created_at)",
)

#: Tickets that were used, tokens that were taken back.
_GRANTS: Final = (
    "CREATE TABLE ticket (id TEXT PRIMARY KEY, expires_at REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX ticket_by_age ON ticket (expires_at)",
    """CREATE TABLE revocation (
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        at REAL NOT NULL,
        expires_at REAL NOT NULL,
        PRIMARY KEY (kind, name)
    ) WITHOUT ROWID""",
    "CREATE INDEX revocation_by_age ON revocation (expires_at)",
)

#: Streams of many runs: which runs have a tag (the JSON in `run.tags` stays what a row shows), and which runs somebody
#: has followed.
_STREAMS: Final = (
    "CREATE TABLE tag (tag TEXT NOT NULL, run INTEGER NOT NULL, PRIMARY KEY (tag, run)) WITHOUT ROWID",
    "INSERT INTO tag SELECT DISTINCT json_each.value, no FROM run, json_each(run.tags)",
    "ALTER TABLE run ADD COLUMN followed INTEGER NOT NULL DEFAULT 0",
)

#: What Django is told of each attempt, as its own Tasks interface wants to know it.
_ATTEMPTED: Final = (
    "ALTER TABLE run ADD COLUMN runner TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE run ADD COLUMN attempted_at REAL",
    "ALTER TABLE run ADD COLUMN failure BLOB",
)

#: What open runs were told by others.
_INPUTS: Final = (
    """CREATE TABLE input (
        run INTEGER NOT NULL,
        number INTEGER NOT NULL,
        name TEXT NOT NULL,
        data BLOB NOT NULL,
        key TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (run, number)
    ) WITHOUT ROWID""",
)

#: What bounds a run's time besides `timeout`.
_LIMITS: Final = tuple(
    f"ALTER TABLE run ADD COLUMN {name} REAL"
    for name in ("soft_timeout", "cpu_timeout", "stall_timeout", "schedule_timeout")
)

#: Limits of a task by key: which one a run has, and what has begun of tasks whose rate is limited.
_THROTTLE: Final = (
    "ALTER TABLE run ADD COLUMN concurrency_key TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE begun (task TEXT NOT NULL, key TEXT NOT NULL, at REAL NOT NULL, until REAL NOT NULL)",
    "CREATE INDEX begun_by_age ON begun (until)",
)

#: Runs that belong together.
_FLOWS: Final = (
    "ALTER TABLE run ADD COLUMN parent TEXT",
    "ALTER TABLE run ADD COLUMN \"after\" BLOB NOT NULL DEFAULT '[]'",
    *(
        f"ALTER TABLE run ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0"
        for name in ("children", "children_ended", "children_failed")
    ),
    "CREATE INDEX run_by_parent ON run (parent) WHERE parent IS NOT NULL",
)

#: Several nodes on one database: whose copy of a run counts.
_FENCES: Final = ("ALTER TABLE run ADD COLUMN fence TEXT NOT NULL DEFAULT ''",)

#: Statements of each step.
STEPS: Final[tuple[Sequence[str], ...]] = (
    *(_FIRST, _CRASHES, _RETENTION, _GRANTS, _STREAMS, _ATTEMPTED, _INPUTS, _LIMITS),
    *(_THROTTLE, _FLOWS, _FENCES),
)


def columns(names: Iterable[str]) -> str:
    """Return column names for a statement; "offset", "after" and "using" are words of SQL."""
    return ", ".join(f'"{name}"' for name in names)


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """Return the value that `meta` has for `key`."""
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchall()
    return str(found[0][0]) if found else None


def set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Write one value of `meta`, inside the caller's transaction if there is one."""
    connection.execute(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
    )


def get_gaps(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    """Return the ranges of positions that were left out after a power cut (gateway.store.rows.Opened.gaps)."""
    return [(low, high) for low, high in json.loads(get_meta(connection, "gaps") or "[]")]


def migrate(connection: sqlite3.Connection, steps: Sequence[Sequence[str]] = STEPS) -> None:
    """Take the steps that the file lacks, all in one transaction.

    Raises:
      StoreTooNew: the file has taken steps that this version does not know. Nothing has changed.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        _take_steps(connection, steps)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _take_steps(connection: sqlite3.Connection, steps: Sequence[Sequence[str]]) -> None:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
    )
    taken = int(get_meta(connection, "schema") or 0)
    if taken > len(steps):
        raise StoreTooNew(
            f"the store has schema {taken}, this version of Bulkhead knows {len(steps)}: a newer wrote it. "
            "Install that version again, or name another state directory"
        )
    for step in steps[taken:]:
        for statement in step:
            connection.execute(statement)
    if taken < len(steps):
        set_meta(connection, "schema", str(len(steps)))
