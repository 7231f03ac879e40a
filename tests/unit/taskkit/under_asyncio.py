"""Coroutines that use the ORM under asyncio, from ordinary tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Return what `main` returns.

    asgiref keeps one thread for all loops of a process; its connection is closed here, lest the next test find
    this one's database.
    """

    async def tidy() -> _T:
        try:
            return await main
        finally:
            await sync_to_async(connections.close_all)()

    return asyncio.run(tidy())
