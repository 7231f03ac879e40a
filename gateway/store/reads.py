"""What can be asked of the store.

Everything here blocks, reads one snapshot and leaves no transaction open. Errors are sqlite3's own and
OSError of the blobs; gateway.store.sqlite translates.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from gateway.store.rows import (
    COPY,
    MAX_QUARANTINED,
    MAX_UNTOLD,
    AttemptRow,
    BegunRow,
    EventRow,
    InputRow,
    KeyRow,
    Opened,
    OutputRow,
    QuarantinedRow,
    RevocationRow,
    RunFilter,
    RunRow,
    TicketRow,
)
from gateway.store.schema import (
    ATTEMPT_COLUMNS,
    BEGUN_COLUMNS,
    EVENT_COLUMNS,
    INPUT_COLUMNS,
    KEY_COLUMNS,
    OUTPUT_COLUMNS,
    REVOCATION_COLUMNS,
    RUN_COLUMNS,
    TICKET_COLUMNS,
    columns,
    get_gaps,
)
from taskkit import linux
from taskkit.identifiers import parse_run_id
from taskkit.lifecycle import RunStatus

_T = TypeVar("_T")

#: Largest blob that is read, bytes. Far above LIMITS.result_bytes (8 MiB); it bounds memory against a file
#: that user code put into the directory.
MAX_BLOB: Final = 64 * 1024 * 1024

#: Largest integer of SQLite: a cursor that a client made up may be larger.
_MAX_INTEGER: Final = 2**63 - 1

_RUN: Final = columns(RUN_COLUMNS)

#: Leaves out copies of runs that are another node's now.
_NO_COPY: Final = f"instr(id, '{COPY}') = 0"

_ATTEMPT: Final = columns(ATTEMPT_COLUMNS)
_EVENT: Final = columns(EVENT_COLUMNS)
_OUTPUT: Final = columns(OUTPUT_COLUMNS)
_KEY: Final = columns(KEY_COLUMNS)


def _run(values: tuple[Any, ...]) -> RunRow:
    named = dict(zip(RUN_COLUMNS, values, strict=True))
    named["status"] = RunStatus(named["status"])
    named["tags"] = tuple(json.loads(named["tags"]))
    if isinstance(named["after"], str):  # of a run that is older than the column
        named["after"] = named["after"].encode()
    named["cancelling"] = bool(named["cancelling"])
    named["suspect"] = bool(named["suspect"])
    named["result_expired"] = bool(named["result_expired"])
    named["followed"] = bool(named["followed"])
    return RunRow(**named)


def _attempt(values: tuple[Any, ...]) -> AttemptRow:
    return AttemptRow(**dict(zip(ATTEMPT_COLUMNS, values, strict=True)))


def _one_run(connection: sqlite3.Connection, rest: str, *values: str) -> RunRow | None:
    found = connection.execute(f"SELECT {_RUN} FROM run {rest} LIMIT 1", values).fetchall()
    return _run(found[0]) if found else None


def opened(connection: sqlite3.Connection) -> Opened:
    """Return what a gateway has to know before its first round."""
    found = connection.execute(
        f"""SELECT {_RUN} FROM run WHERE no IN (
            SELECT no FROM run WHERE status IN ('READY', 'RUNNING')
            UNION SELECT no FROM (
                SELECT no FROM run WHERE version > told AND status NOT IN ('READY', 'RUNNING') ORDER BY no LIMIT ?
            )
        ) ORDER BY no""",
        (MAX_UNTOLD,),
    )
    runs = {run.no: run for run in map(_run, found)}
    ended = sum(run.status.is_terminal for run in runs.values())
    attempts = connection.execute(f"SELECT {_ATTEMPT} FROM attempt WHERE ending IS NULL ORDER BY run, number")
    return Opened(
        runs=runs,
        attempts=[_attempt(values) for values in attempts],
        sources=dict(connection.execute("SELECT runner, seq FROM source")),
        next_no=_next(connection, "run"),
        next_pos=_next(connection, "event"),
        breakers=dict(connection.execute("SELECT task, record FROM breaker")),
        quarantined=_quarantined(connection),
        tickets=_all(connection, "ticket", TICKET_COLUMNS, TicketRow),
        revocations=_all(connection, "revocation", REVOCATION_COLUMNS, RevocationRow),
        inputs=_all(connection, "input", INPUT_COLUMNS, InputRow, "run, number"),
        begun=_all(connection, "begun", BEGUN_COLUMNS, BegunRow, "at"),
        more_untold=ended == MAX_UNTOLD,
        gaps=get_gaps(connection),
        newest_id=connection.execute("SELECT coalesce(max(id), '') FROM run").fetchone()[0],
    )


def _all(
    connection: sqlite3.Connection,
    table: str,
    names: Iterable[str],
    row: Callable[..., _T],
    order: str = "expires_at",
) -> list[_T]:
    found = connection.execute(f"SELECT {columns(names)} FROM {table} ORDER BY {order}")
    return [row(*values) for values in found.fetchall()]


def _quarantined(connection: sqlite3.Connection) -> list[QuarantinedRow]:
    """Return the newest quarantined runs of which nobody has made another, oldest first."""
    found = connection.execute(
        """SELECT id, task, finished_at FROM run WHERE status = 'FAILED' AND crashes >= 3
            AND NOT EXISTS (SELECT 1 FROM run AS other WHERE other.replay_of = run.id)
            ORDER BY no DESC LIMIT ?""",
        (MAX_QUARANTINED,),
    )
    return [QuarantinedRow(*values) for values in reversed(found.fetchall())]


def _next(connection: sqlite3.Connection, table: str) -> int:
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchall()
    return int(found[0][0]) + 1 if found else 1


def untold(connection: sqlite3.Connection, after: int, limit: int) -> list[RunRow]:
    """Return runs with number > `after` of which Django does not have the newest version, oldest first."""
    found = connection.execute(
        f"SELECT {_RUN} FROM run WHERE version > told AND no > ? ORDER BY no LIMIT ?",
        (min(after, _MAX_INTEGER), max(0, limit)),
    )
    return [_run(values) for values in found.fetchall()]


def run(connection: sqlite3.Connection, id: str) -> RunRow | None:
    """Return the run with this public id."""
    return _one_run(connection, "WHERE id = ?", id)


def runs_by_id(connection: sqlite3.Connection, ids: Sequence[str]) -> dict[str, RunRow]:
    """Return those of the runs with these public ids that there are."""
    found = connection.execute(f"SELECT {_RUN} FROM run WHERE id IN ({_marks(ids)})", ids).fetchall()
    return {run.id: run for run in map(_run, found)}


def copies(connection: sqlite3.Connection, ids: Sequence[str]) -> dict[str, RunRow]:
    """Return the newest copies of those of the runs with these public ids that are another node's now."""
    found: dict[str, RunRow] = {}
    for id in ids:
        low, high = f"{id}{COPY}", f"{id}{COPY}{COPY}"
        copy = _one_run(connection, "WHERE id > ? AND id < ? ORDER BY no DESC", low, high)
        if copy is not None:
            found[id] = copy
    return found


def _marks(values: Sequence[str]) -> str:
    """Return a place for each value; SQLite takes 32,766 of them (SQLITE_MAX_VARIABLE_NUMBER)."""
    return ", ".join("?" * len(values))


def run_of_row(connection: sqlite3.Connection, row_key: str) -> RunRow | None:
    """Return the newest run of a task row."""
    return _one_run(connection, f"WHERE row_key = ? AND {_NO_COPY} ORDER BY no DESC", row_key)


def _glob(pattern: str) -> str:
    """Return `pattern` with nothing special but the star."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def _conditions(which: RunFilter) -> Iterable[tuple[str, Any]]:
    if which.status is not None:
        yield "status = ?", which.status.value
    if which.task is not None:
        yield "task = ?", which.task
    if which.tag is not None:
        yield "no IN (SELECT run FROM tag WHERE tag = ?)", which.tag
    if which.since is not None:
        yield "created_at >= ?", which.since
    if which.until is not None:
        yield "created_at < ?", which.until
    if which.subject is not None:
        yield "subject = ?", which.subject
    if which.parent is not None:
        yield "parent = ?", which.parent
    if which.before is not None:
        yield "no < ?", min(which.before, _MAX_INTEGER)


def visible(
    owner: str | None, ids: Sequence[str] | None, tasks: Sequence[str] | None
) -> Iterable[tuple[str, Any]]:
    """Return conditions on a run with their values, of which one is enough; none: every run is visible."""
    if owner is not None:
        yield "subject = ?", owner
    # One JSON array for any number of items: SQLite allows 32,766 parameters.
    if ids is not None:
        yield "id IN (SELECT value FROM json_each(?))", json.dumps(ids)
    if tasks is not None:
        patterns = json.dumps([_glob(name) for name in tasks])
        yield "EXISTS (SELECT 1 FROM json_each(?) WHERE run.task GLOB json_each.value)", patterns


def runs(connection: sqlite3.Connection, which: RunFilter) -> list[RunRow]:
    """Return the runs that `which` selects, newest first.

    All its conditions must hold, except that of `ids` and `tasks` one is enough. `since` is included, `until`
    is not. In `tasks`, `*` stands for any characters.
    """
    conditions, reach = list(_conditions(which)), list(visible(which.owner, which.ids, which.tasks))
    texts = [text for text, _ in conditions]
    if reach:
        texts.append(f"({' OR '.join(text for text, _ in reach)})")
    texts.append(_NO_COPY)
    where = f"WHERE {' AND '.join(texts)}"
    values = [value for _, value in (*conditions, *reach)]
    found = connection.execute(
        f"SELECT {_RUN} FROM run {where} ORDER BY no DESC LIMIT ?", (*values, max(0, which.limit))
    )
    return [_run(row) for row in found.fetchall()]


def attempts(connection: sqlite3.Connection, run: int) -> list[AttemptRow]:
    """Return the attempts of a run that have begun, or may yet, oldest first."""
    found = connection.execute(
        f"SELECT {_ATTEMPT} FROM attempt WHERE run = ? AND (started_at IS NOT NULL OR ending IS NULL) "
        "ORDER BY number",
        (run,),
    )
    return [_attempt(values) for values in found.fetchall()]


def events(
    connection: sqlite3.Connection, blobs: Path, run: int, after: int, limit: int, max_bytes: int
) -> list[EventRow]:
    """Return events of a run with offset > `after`, oldest first, with `data` filled in from `blobs`.

    At most `limit`, and at most `max_bytes` of data unless the first alone exceeds it.
    """
    return filled(_event_rows(connection, run, min(after, _MAX_INTEGER), limit, max_bytes), blobs, max_bytes)


def filled(rows: Iterable[EventRow], blobs: Path, max_bytes: int) -> list[EventRow]:
    """Return rows with `data` filled in from `blobs`, at most `max_bytes` of it unless the first alone exceeds it.

    Rows first, files later: a slow file must not keep a snapshot, and with it the WAL.
    """
    chosen: list[EventRow] = []
    left = max_bytes
    for row in rows:
        event = row if row.blob is None else row._replace(data=read_blob(blobs, row.blob))
        left -= len(event.data)
        if chosen and left < 0:
            break
        chosen.append(event)
    return chosen


def _event_rows(
    connection: sqlite3.Connection, run: int, after: int, limit: int, max_bytes: int
) -> list[EventRow]:
    cursor = connection.execute(
        f'SELECT {_EVENT} FROM event WHERE run = ? AND "offset" > ? ORDER BY "offset" LIMIT ?',
        (run, after, max(0, limit)),
    )
    return taken(cursor, max_bytes)


def taken(cursor: sqlite3.Cursor, max_bytes: int) -> list[EventRow]:
    """Return the rows of a query for events up to `max_bytes` of data, the first in any case; close it."""
    rows: list[EventRow] = []
    left = max_bytes
    with contextlib.closing(cursor):
        for values in cursor:
            event = EventRow(*values)
            left -= len(event.data)
            if rows and left < 0:
                break
            rows.append(event)
    return rows


def outputs(connection: sqlite3.Connection, run: int, after: int, limit: int) -> list[OutputRow]:
    """Return output lines of a run with offset > `after`, oldest first."""
    found = connection.execute(
        f'SELECT {_OUTPUT} FROM output WHERE run = ? AND "offset" > ? ORDER BY "offset" LIMIT ?',
        (run, min(after, _MAX_INTEGER), max(0, limit)),
    )
    return [OutputRow(*values) for values in found.fetchall()]


def last_outputs(connection: sqlite3.Connection, run: int, attempt: int, limit: int) -> list[OutputRow]:
    """Return the newest `limit` lines of one attempt, oldest first."""
    found = connection.execute(
        f'SELECT {_OUTPUT} FROM output WHERE run = ? AND attempt = ? ORDER BY "offset" DESC LIMIT ?',
        (run, attempt, max(0, limit)),
    )
    return [OutputRow(*values) for values in reversed(found.fetchall())]


def key(connection: sqlite3.Connection, subject: str, key: str) -> KeyRow | None:
    """Return what an idempotency key was used for."""
    found = connection.execute(
        f"SELECT {_KEY} FROM idempotency WHERE subject = ? AND key = ?", (subject, key)
    ).fetchall()
    return KeyRow(*found[0]) if found else None


def keys(connection: sqlite3.Connection, subject: str, keys: Sequence[str]) -> dict[str, KeyRow]:
    """Return what those of a subject's idempotency keys were used for that were used."""
    found = connection.execute(
        f"SELECT {_KEY} FROM idempotency WHERE subject = ? AND key IN ({_marks(keys)})", (subject, *keys)
    ).fetchall()
    return {row.key: row for row in (KeyRow(*values) for values in found)}


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many runs there are by status, zeros included."""
    found = connection.execute("SELECT status, count(*) FROM run GROUP BY status").fetchall()
    return {status.value: 0 for status in RunStatus} | dict(found)


def read_blob(blobs: Path, name: str) -> bytes:
    """Return the content of a blob, or `{"_missing_blob": name}` so that a stream goes on without it.

    Runners write the directory, so user code can: only a plain file under a UUID's name counts, of MAX_BLOB
    bytes at most; symbolic links are not followed and a named pipe does not block.

    Raises:
      OSError: the disk does not answer, or the process is out of descriptors.
    """
    missing = json.dumps({"_missing_blob": name}).encode()
    if parse_run_id(name) != name:
        return missing
    try:
        fd = os.open(blobs / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENXIO):
            return missing
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BLOB:
            return missing
        return linux.read_from_start(fd, status.st_size)
    finally:
        os.close(fd)
