"""The project's databases in a runner that lives on: while it waits for orders it holds no connection.

As between two requests of a Django site: `CONN_MAX_AGE` keeps one for longer.
"""

from __future__ import annotations

from typing import Any

from taskkit.threads import in_thread, under_asyncio

_opened = False


def watch() -> None:
    """Notice from now on that a connection was made: most tasks make none, and shall not pay for a look."""
    from django.db.backends.signals import connection_created

    connection_created.connect(_note)


def _note(**_: Any) -> None:
    global _opened
    _opened = True


def release() -> None:
    """Close what this thread has, unless it may be kept."""
    if _opened:
        from django.db import close_old_connections

        close_old_connections()


async def arelease() -> None:
    """Do so in the thread of Django's asynchronous methods; those of other threads are closed after each call."""
    if _opened and under_asyncio():
        await in_thread(release)
