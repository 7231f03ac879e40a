"""Inserts the events of a round.

µs of CPU per event of 200 bytes: four runs, 952 events in a transaction, SQLite 3.40, two turns or four; checkpoints
beside it add 0.5 to every line.

    one row a statement                             6.8 - 9.5
    32 rows a statement                             6.0 - 6.1     8 rows: 6.3 - 7.1, 64 rows: 5.9 - 6.6
    32 rows, the column `blob` left out             4.7 - 5.6     chosen
    … without AUTOINCREMENT                         5.0 - 5.1     the position of a removed event is given out again
    32 rows, WITHOUT ROWID, key (run, offset)       6.0 - 7.6     the file is 12 % larger
    32 rows, pages of 8 KiB or 16 KiB               6.3 - 6.8
    32 rows, a cache of 64 MiB                      6.2 - 6.7
    32 rows, mmap_size of 1 GiB                     4.9 - 5.9     a file that is cut under it is a SIGBUS
    32 rows, no index on (run, offset)              2.7 - 3.8     a stream could not be read on from its cursor

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
