"""The bounds within which the courier uses a database.

A database that refuses is no trouble: the next try comes later. One that hangs would hold up the other databases, the
questions of the gateway and the beat; one whose file was moved away would take what nobody finds again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from django.db import OperationalError, connections

#: Seconds for one connection attempt, where the project says nothing: without it, PostgreSQL's client waits
#: as long as the kernel retries SYN (about two minutes).
CONNECT_TIMEOUT: Final = 5

#: Seconds to wait for SQLite's lock, at most: its wait cannot be interrupted. Django's own default.
LOCK_TIMEOUT: Final = 5.0

#: Seconds for one piece of work before the connection is given up: 100 transitions take 0.1 s, over a line of 50 ms
#: 15 s, and are halved until they fit. Django may connect anew on the way out, for another CONNECT_TIMEOUT: together a
#: quarter of the 60 s of silence after which the supervisor replaces a courier.
HANG_SECONDS: Final = 10.0


def limit_waiting(alias: str) -> None:
    """Bound how long connecting, or a lock of SQLite's, is waited for in the database `alias`."""
    connection = connections[alias]
    options = connection.settings_dict["OPTIONS"]
    if connection.vendor in ("postgresql", "mysql"):
        options.setdefault("connect_timeout", CONNECT_TIMEOUT)
    elif connection.vendor == "sqlite":
        options["timeout"] = min(options.get("timeout", LOCK_TIMEOUT), LOCK_TIMEOUT)


@contextmanager
def hang_limit(alias: str) -> Iterator[None]:
    """Raise OperationalError in the body when it takes longer than HANG_SECONDS.

    A signal ends the wait for a server that is stopped, or for a lock of another session, where the driver lets
    signals through (psycopg does). Where it does not, the beat stays out and the supervisor replaces the courier. Does
    nothing outside of the main thread, which alone hears signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: object) -> None:
        raise OperationalError(f"the database {alias!r} hangs: no answer within {HANG_SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Place:
    """The file that a connection has open, compared with the one that its name leads to.

    SQLite goes on writing to a file that was moved away or replaced, and makes a new one where there is none.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._open: tuple[int, int] | None = None

    def check(self) -> None:
        """Let the connection be used, if its file is where it was.

        Raises:
          OperationalError: it is not; the connection is closed. Try again.
        """
        connection = connections[self._alias]
        if connection.vendor != "sqlite":
            return
        name = str(connection.settings_dict["NAME"])
        if ":" in name.partition("/")[0]:  # in memory, or a URI
            return
        try:
            found = os.stat(name)
        except OSError as error:
            connection.close()
            raise OperationalError(f"its file {name!r} is not there: {error.strerror}") from error
        place, before = (found.st_dev, found.st_ino), self._open
        self._open = place
        if connection.connection is not None and before not in (None, place):
            connection.close()
            raise OperationalError(f"its file {name!r} was replaced")
