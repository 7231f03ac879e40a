"""Inserts the events of a round.

All costs are µs of CPU per event of 200 bytes, four runs, 952 events in a transaction, SQLite 3.40, two turns each; a
checkpoint beside the writer adds 0.5 to every line.

    one row a statement, as a mapped dataclass      9.3 - 10.0
    32 rows a statement                             6.3 -  6.6    8 rows: 6.5 - 6.9, 64 rows: 6.0 - 6.6
    32 rows, the column `blob` left out             5.3 -  5.6    chosen
    … without AUTOINCREMENT                         5.2 -  5.5    the position of a removed event is given out again
    32 rows, WITHOUT ROWID, key (run, offset)       5.7 -  5.9    the file is 12 % larger
    32 rows, pages of 8 KiB or 16 KiB               5.9 -  6.7
    32 rows, a cache of 64 MiB                      6.4 -  6.6
    32 rows, mmap_size of 1 GiB                     5.8 -  6.0    a file that is cut under it is a SIGBUS
    32 rows, (run, offset) not unique               4.7 -  5.0    nothing would notice an offset used twice

So what counts is how often Python and SQLite change hands, the GIL with them, and hardly how the table is made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Final

from gateway.store.rows import EventRow
from gateway.store.schema import EVENT_COLUMNS, columns

#: Events that one statement inserts; what is left over is inserted one by one.
JOINED: Final = 32

_SMALL: Final = EVENT_COLUMNS[:-1]  # all but `blob`, which few have


def _insert(names: Sequence[str], rows: int = 1) -> str:
    row = f"({', '.join('?' * len(names))})"
    return f"INSERT INTO event ({columns(names)}) VALUES {', '.join([row] * rows)}"


_INSERT_JOINED: Final = _insert(_SMALL, JOINED)
_INSERT_SMALL: Final = _insert(_SMALL)
_INSERT_LARGE: Final = _insert(EVENT_COLUMNS)


def insert_events(connection: sqlite3.Connection, events: Sequence[EventRow]) -> None:
    """Insert events, inside the caller's transaction.

    Raises:
      sqlite3.IntegrityError: a position, or an offset of a run, was used before.
    """
    rows = [event[:-1] for event in events if event.blob is None]
    whole = len(rows) - len(rows) % JOINED
    for start in range(0, whole, JOINED):
        connection.execute(_INSERT_JOINED, list(chain.from_iterable(rows[start : start + JOINED])))
    connection.executemany(_INSERT_SMALL, rows[whole:])
    if len(rows) < len(events):  # the data of the others is in their files
        large = [event._replace(data=b"") for event in events if event.blob is not None]
        connection.executemany(_INSERT_LARGE, large)
