"""Synchronous ORM code called from asyncio or trio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio.to_thread
from asgiref.sync import sync_to_async
from django.db import connections

_P = ParamSpec("_P")
_R = TypeVar("_R")


def under_asyncio() -> bool:
    """Whether an asyncio loop runs in this thread; Django refuses the ORM there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def in_thread(call: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Return what `call` returns, made in a thread that may use the ORM.

    Under asyncio it is asgiref's thread-sensitive thread, so `call` sees the connection and the transaction
    of Django's own async methods. Under trio, where asgiref does not work, it is a worker thread with
    connections of its own. Cancelled: returns at once; the thread finishes what it does, its outcome is lost.
    """
    if under_asyncio():
        return await sync_to_async(call, thread_sensitive=True)(*args, **kwargs)
    return await anyio.to_thread.run_sync(
        with_own_connections, partial(call, *args, **kwargs), abandon_on_cancel=True
    )


def with_own_connections(call: Callable[[], _R]) -> _R:
    """Return what `call` returns, then close this thread's connections: in a pool nobody else would."""
    try:
        return call()
    finally:
        connections.close_all()
