"""Events of many runs in the order of their positions.

Within a run positions grow with offsets, and what is kept of a run has no hole. So a position is found in a run by
halving its offsets, and many runs are merged by looking at their next positions only: both in the index of
(run, offset), which holds the positions as well. No index over positions and runs is needed.

Everything here blocks; see gateway.store.reads.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gateway.store.reads import filled, taken, visible
from gateway.store.rows import EventRow, Mix, Place
from gateway.store.schema import EVENT_COLUMNS, columns

#: Positions of one run that are looked up at once: what lies next of a run that speaks alone.
_AHEAD: Final = 64

_EVENT: Final = columns(EVENT_COLUMNS)


def places(
    connection: sqlite3.Connection, mix: Mix, after: int, limit: int
) -> tuple[list[Place], int | None]:
    """Return where a reader at position `after` stands in each run of `mix` that is open, named, or has more for him.

    Of ended runs with a tag that have more at most `limit`, those that go on first. The other part of the answer is
    then the position up to which no other one does, else None. A run of `mix` that has gone is not among them.
    """
    tags, reach = json.dumps(mix.tags), list(visible(mix.owner, mix.ids, mix.tasks))
    reached = f"AND ({' OR '.join(text for text, _ in reach)})" if reach else ""
    found = connection.execute(
        f"""SELECT no, id, epoch, tail, status IN ('READY', 'RUNNING') AS open, named,
            (SELECT pos FROM event WHERE run = no AND "offset" = tail) AS last,
            (SELECT pos FROM event WHERE run = no ORDER BY "offset" LIMIT 1) AS first
            FROM (
                SELECT value AS no, 1 AS named FROM json_each(?)
                UNION ALL SELECT no, 0 FROM run WHERE no IN (
                    SELECT run FROM tag WHERE tag IN (SELECT value FROM json_each(?))
                    EXCEPT SELECT value FROM json_each(?)
                ) {reached}
            ) JOIN run USING (no) WHERE open OR named OR last > ?""",
        (json.dumps(mix.runs), tags, json.dumps(mix.runs), *(value for _, value in reach), after),
    )
    kept: list[Place] = []
    ended: list[Place] = []
    for no, id, epoch, tail, is_open, named, last, first in found.fetchall():
        if last is None or last <= after:
            seen, following = tail, 0
        elif first > after:
            seen, following = 0, first
        else:
            seen, following = _place(connection, no, after)
        place = Place(no, id, epoch, seen, following, last or 0, bool(is_open))
        (kept if is_open or named else ended).append(place)
    chosen = heapq.nsmallest(limit + 1, ended, key=lambda place: place.next)
    if len(chosen) <= limit:
        return kept + chosen, None
    return kept + chosen[:limit], chosen[limit].next - 1


def _place(connection: sqlite3.Connection, run: int, after: int) -> tuple[int, int]:
    """Return the offset of the newest event up to position `after`, and the position of the next: there are both."""
    ends = [
        f'SELECT "offset" FROM event WHERE run = ?1 ORDER BY "offset" {order} LIMIT 1'
        for order in ("ASC", "DESC")
    ]
    low, high = (connection.execute(end, (run,)).fetchall()[0][0] for end in ends)
    while high - low > 1:  # the event at `low` is one of those, the event at `high` is not
        middle = (low + high) // 2
        if _position(connection, run, middle) <= after:
            low = middle
        else:
            high = middle
    return low, _position(connection, run, high)


def _position(connection: sqlite3.Connection, run: int, offset: int) -> int:
    found = connection.execute(
        'SELECT pos FROM event WHERE run = ? AND "offset" = ?', (run, offset)
    ).fetchall()
    return int(found[0][0]) if found else 0


def merged(
    connection: sqlite3.Connection,
    blobs: Path,
    heads: Sequence[tuple[int, int]],
    upto: int,
    limit: int,
    max_bytes: int,
) -> tuple[list[EventRow], int]:
    """Return what follows in runs, each with the offset it was read to, by position, up to position `upto`.

    At most `limit` events, and at most `max_bytes` of data unless the first alone exceeds it. The other part of the
    answer is the position up to which this is all there is.
    """
    ahead = [_ahead(connection, run, after, upto) for run, after in heads]
    positions = list(itertools.islice(heapq.merge(*ahead), limit))
    found = connection.execute(
        f"SELECT {_EVENT} FROM event WHERE pos IN (SELECT value FROM json_each(?)) ORDER BY pos",
        (json.dumps(positions),),
    )
    rows = filled(taken(found, max_bytes), blobs, max_bytes)
    cut = len(positions) == limit or (rows and rows[-1].pos < positions[-1])
    return rows, rows[-1].pos if rows and cut else upto


def _ahead(connection: sqlite3.Connection, run: int, after: int, upto: int) -> Iterator[int]:
    """Yield the positions that follow in a run: one, for most runs are not next; then more and more at a time."""
    number = 1
    while True:
        found = connection.execute(
            'SELECT "offset", pos FROM event WHERE run = ? AND "offset" > ? ORDER BY "offset" LIMIT ?',
            (run, after, number),
        ).fetchall()
        for _, position in found:
            if position > upto:
                return
            yield position
        if len(found) < number:
            return
        number = min(2 * number, _AHEAD)
        after = found[-1][0]
