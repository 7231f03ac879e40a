"""The SQL of one slice of retention, inside the writer's transaction.

Everything here blocks, on the writer's thread: commits wait meanwhile. So a slice touches at most SLICE_ROWS rows of a
table, which takes about 0.4 ms (measured: 1.6 µs per event; in slices of 1,000 it is 1.5, but commits wait four times
as long).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any, Final

from gateway.store.removal import (
    OldestEvents,
    OldEvents,
    OldGrants,
    OldKeys,
    OldResults,
    OldRuns,
    Removal,
    Removed,
    RunLength,
    SurplusEvents,
)

#: Rows that one slice takes out at most.
SLICE_ROWS: Final = 250

#: Bytes that a row takes besides its data: measured 59 for an event with its index entry.
ROW_BYTES: Final = 64

#: What retention may end with: it has ended, and Django knows how. The words are those of the indexes.
_DONE: Final = "finished_at IS NOT NULL AND version <= told AND finished_at < ?"

_HEAVY: Final = {"event": "data", "output": "text"}


class Slices:
    """Takes out what is due, one slice at a time. Remembers how far the oldest events were looked at.

    Args:
      blobs: directory of the large values; their sizes count as their events'.
    """

    def __init__(self, connection: sqlite3.Connection, blobs: Path) -> None:
        self.connection = connection
        self.blobs = blobs
        #: events up to this position are gone, or were the newest of their run when they were looked at
        self.position = 0

    def take(self, removal: Removal) -> Removed:
        """Take one slice of `removal` out; the caller commits, or rolls back and forgets this object's position."""
        return _take(removal, self)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        return self.connection.execute(sql, values).fetchall()

    def prefix(self, table: str, run: int, upto: int, limit: int = SLICE_ROWS) -> Removed:
        """Take out the rows of a run with offset <= `upto`, oldest first, with offsets within `limit` of the first."""
        first = self.rows(f'SELECT min("offset") FROM {table} WHERE run = ?', run)[0][0]
        removed = Removed()
        if first is None or first > upto:
            return removed
        last = min(upto, first + limit - 1)
        where = f'FROM {table} WHERE run = ? AND "offset" <= ?'
        names = "group_concat(blob)" if table == "event" else "NULL"
        heavy = _HEAVY[table]
        count, size, blobs = self.rows(
            f"SELECT count(*), total(length({heavy})), {names} {where}", run, last
        )[0]
        self.connection.execute(f"DELETE {where}", (run, last))
        removed.size = int(size) + count * ROW_BYTES
        removed.blobs = blobs.split(",") if blobs else []
        removed.size += sizes(self.blobs, removed.blobs)
        removed.more = last < upto
        if table == "event":
            removed.events = count
        else:
            removed.lines = count
        return removed


@singledispatch
def _take(removal: object, slices: Slices) -> Removed:
    raise TypeError(f"{removal!r} is no removal")


@_take.register
def _(removal: OldEvents, slices: Slices) -> Removed:
    removed = _oldest_events(slices, removal.before)
    if not removed.more:
        removed.add(_oldest_lines(slices, removal.before, SLICE_ROWS))
    return removed


@_take.register
def _(removal: OldestEvents, slices: Slices) -> Removed:
    event = slices.rows("SELECT at FROM event WHERE pos > ? ORDER BY pos LIMIT 1", slices.position)
    line = slices.rows("SELECT at FROM output ORDER BY at LIMIT 1")
    if not event and not line:
        return Removed()
    # What is older goes first; a window that overshoots `size` by less than a slice is fine.
    if event and (not line or event[0][0] <= line[0][0]):
        removed = _oldest_events(slices, None, removal.size)
    else:
        removed = _oldest_lines(slices, None, SLICE_ROWS)
    removed.more = removed.size < removal.size
    return removed


@_take.register
def _(removal: SurplusEvents, slices: Slices) -> Removed:
    found = slices.rows("SELECT tail, lines FROM run WHERE no = ?", removal.run)
    if not found:
        return Removed()
    tail, lines = found[0]
    removed = slices.prefix("event", removal.run, tail - max(1, removal.keep))
    if not removed.more:
        removed.add(slices.prefix("output", removal.run, lines - removal.keep))
    return removed


@_take.register
def _(removal: OldRuns, slices: Slices) -> Removed:
    removed = Removed()
    due = slices.rows(
        f"SELECT no, id, tail, lines, result_blob FROM run WHERE {_DONE} ORDER BY finished_at LIMIT 50",
        removal.before,
    )
    for run, id, tail, lines, blob in due:
        for table, upto in (("event", tail - 1), ("output", lines)):
            removed.add(slices.prefix(table, run, upto, SLICE_ROWS - removed.rows))
            if removed.more or removed.rows >= SLICE_ROWS:
                removed.more = True
                return removed
        _forget(slices, run, id, blob, removed)
    removed.more = len(due) == 50
    return removed


def _forget(slices: Slices, run: int, id: str, blob: str | None, removed: Removed) -> None:
    """Take out a run of which nothing but its end is left."""
    removed.add(slices.prefix("event", run, 2**62))
    for table in ("attempt", "ending"):
        slices.connection.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
    slices.connection.execute(
        "DELETE FROM tag WHERE run = ?1 AND tag IN (SELECT value FROM run, json_each(run.tags) WHERE no = ?1)",
        (run,),
    )
    removed.keys += slices.connection.execute("DELETE FROM idempotency WHERE run = ?", (id,)).rowcount
    slices.connection.execute("DELETE FROM run WHERE no = ?", (run,))
    removed.runs += 1
    removed.blobs += [blob] if blob else []


@_take.register
def _(removal: OldResults, slices: Slices) -> Removed:
    due = slices.rows(
        f"SELECT no, result_blob FROM run WHERE {_DONE} AND (result IS NOT NULL OR result_blob IS NOT NULL) "
        "ORDER BY finished_at LIMIT 50",  # up to 8 MiB each, in pages of their own
        removal.before,
    )
    slices.connection.executemany(
        "UPDATE run SET result = NULL, result_blob = NULL, result_expired = 1 WHERE no = ?",
        [(run,) for run, _ in due],
    )
    return Removed(results=len(due), blobs=[blob for _, blob in due if blob], more=len(due) == 50)


@_take.register
def _(removal: OldKeys, slices: Slices) -> Removed:
    due = slices.rows(
        "SELECT subject, key FROM idempotency WHERE created_at < ? ORDER BY created_at LIMIT ?",
        removal.before,
        SLICE_ROWS,
    )
    slices.connection.executemany("DELETE FROM idempotency WHERE subject = ? AND key = ?", due)
    return Removed(keys=len(due), more=len(due) == SLICE_ROWS)


@_take.register
def _(removal: OldGrants, slices: Slices) -> Removed:
    removed = Removed()
    for table, key in (("ticket", "id"), ("revocation", "kind, name")):
        removed.grants += slices.connection.execute(
            f"DELETE FROM {table} WHERE ({key}) IN "
            f"(SELECT {key} FROM {table} WHERE expires_at < ? ORDER BY expires_at LIMIT ?)",
            (removal.before, SLICE_ROWS - removed.grants),
        ).rowcount
    removed.more = removed.grants == SLICE_ROWS
    return removed


def _oldest_events(slices: Slices, before: float | None, size: int | None = None) -> Removed:
    """Take out the oldest events, up to the last of the next SLICE_ROWS that is from before `before`.

    The last, not the first that is younger: a clock that was wrong for a moment may have dated some events into the
    future, and what lies behind them is no younger than they are.
    """
    window = slices.rows(
        "SELECT pos, run, at, length(data) FROM event WHERE pos > ? ORDER BY pos LIMIT ?",
        slices.position,
        SLICE_ROWS,
    )
    window = window[: _reach(window, before, size)]
    removed = Removed()
    if not window:
        return removed
    upto = window[-1][0]
    # By run, not by position: an event that was its run's newest when the last slice passed it goes now.
    ends = slices.rows(
        """SELECT no, min(run.tail - 1, max(event."offset")) FROM event JOIN run ON no = event.run
            WHERE pos > ? AND pos <= ? GROUP BY no""",
        slices.position,
        upto,
    )
    for run, end in ends:
        removed.add(slices.prefix("event", run, end, end))
    slices.position = upto
    removed.more = len(window) == SLICE_ROWS
    return removed


def _reach(window: Sequence[tuple[Any, ...]], before: float | None, size: int | None) -> int:
    """Return how many rows of the window are meant."""
    if before is not None:
        return max((number for number, row in enumerate(window, 1) if row[2] < before), default=0)
    left = size or 0
    for number, row in enumerate(window, 1):
        left -= row[3] + ROW_BYTES
        if left <= 0:
            return number
    return len(window)


def _oldest_lines(slices: Slices, before: float | None, limit: int) -> Removed:
    limit_to, values = ("", ()) if before is None else ("WHERE at < ?", (before,))
    due = slices.rows(
        f"""SELECT run, max("offset"), count(*) FROM
            (SELECT run, "offset" FROM output {limit_to} ORDER BY at LIMIT ?) GROUP BY run""",
        *values,
        limit,
    )
    removed = Removed()
    full = sum(count for _, _, count in due) == limit
    for run, last, count in due:
        # As many as were seen: a clock that stepped back may have left older numbers with younger times.
        removed.add(slices.prefix("output", run, last, max(count, 1)))
    removed.more = full
    return removed


def sizes(blobs: Path, names: Iterable[str]) -> int:
    """Return the bytes of these large values; a file that is not there has none."""
    total = 0
    for name in names:
        try:
            total += os.lstat(blobs / name).st_size
        except OSError:
            continue
    return total


def lengths(
    connection: sqlite3.Connection, numbers: Sequence[int], after: int, limit: int
) -> list[RunLength]:
    """Return the lengths of the runs in `numbers`, and of at most `limit` runs with a number > `after`, by number."""
    what = "SELECT no, status IN ('READY', 'RUNNING'), tail, lines FROM run"
    known = connection.execute(
        f"{what} WHERE no IN (SELECT value FROM json_each(?)) ORDER BY no", (json.dumps(list(numbers)),)
    ).fetchall()
    new = connection.execute(f"{what} WHERE no > ? ORDER BY no LIMIT ?", (after, limit)).fetchall()
    return [RunLength(no, bool(is_open), tail, lines) for no, is_open, tail, lines in (*known, *new)]


def weigh_events(connection: sqlite3.Connection, after: int, upto: int, limit: int) -> tuple[int, int]:
    """Return (bytes of the next `limit` events behind position `after`, the position of the last; 0: no more)."""
    count, size, last = connection.execute(
        """SELECT count(*), total(size), max(pos) FROM
            (SELECT pos, length(data) AS size FROM event WHERE pos > ? AND pos <= ? ORDER BY pos LIMIT ?)""",
        (after, upto, limit),
    ).fetchall()[0]
    return int(size) + count * ROW_BYTES, int(last or 0)


def weigh_lines(connection: sqlite3.Connection, run: int) -> int:
    """Return the bytes of one run's lines."""
    count, size = connection.execute(
        "SELECT count(*), total(length(text)) FROM output WHERE run = ?", (run,)
    ).fetchall()[0]
    return int(size) + int(count) * ROW_BYTES


def next_with_lines(connection: sqlite3.Connection, after: int, upto: int) -> int | None:
    """Return the next run with output lines."""
    found = connection.execute("SELECT min(run) FROM output WHERE run > ? AND run <= ?", (after, upto))
    value = found.fetchall()[0][0]
    return None if value is None else int(value)


def blobs_of_events(connection: sqlite3.Connection) -> list[str]:
    """Return the names of the large values that events refer to."""
    return [name for (name,) in connection.execute("SELECT blob FROM event WHERE blob IS NOT NULL")]


def unreferenced(connection: sqlite3.Connection, names: Sequence[str]) -> list[str]:
    """Return those of `names` that no event and no result refers to."""
    found = connection.execute(
        """SELECT value FROM json_each(?)
            WHERE NOT EXISTS (SELECT 1 FROM event WHERE blob = value AND blob IS NOT NULL)
            AND NOT EXISTS (SELECT 1 FROM run WHERE result_blob = value AND result_blob IS NOT NULL)""",
        (json.dumps(list(names)),),
    )
    return [name for (name,) in found.fetchall()]


def oldest_open_attempt(connection: sqlite3.Connection) -> float | None:
    """Return when the oldest attempt that has not ended was assigned, in Unix seconds."""
    found = connection.execute("SELECT min(assigned_at) FROM attempt WHERE ending IS NULL").fetchall()
    value = found[0][0]
    return None if value is None else float(value)
