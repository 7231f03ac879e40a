"""Runs whose results are in files, told to Django one after another: each has MiBs, many may wait.

One per link to a courier; it ends with it, and what it has not told is told to the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from gateway.store.protocol import Store, StoreError
from gateway.store.rows import RunRow

logger = logging.getLogger("bulkhead.gateway")

#: Seconds until a result that the disk did not give is asked for again.
_READ_AGAIN: Final = 1.0


class Bulk:
    """Reads a result, tells it, waits until Django has it, then turns to the next.

    Args:
      store: what reads the files.
      tell: called with a run and its result; does not wait.
    """

    def __init__(self, store: Store, tell: Callable[[RunRow, bytes], None]) -> None:
        self._store = store
        self._tell = tell
        self._waiting: deque[RunRow] = deque()
        self._more = trio.Event()
        self._told = trio.Event()

    def add(self, run: RunRow) -> None:
        """Have it told when it is its turn."""
        self._waiting.append(run)
        self._more.set()

    def told(self, run: str) -> None:
        """Django has the run of this id."""
        if self._waiting and self._waiting[0].id == run:
            self._told.set()

    async def run(self) -> None:
        """Tell of all that comes, until cancelled."""
        while True:
            await self._more.wait()
            while self._waiting:
                await self._next(self._waiting[0])
                self._waiting.popleft()
            self._more = trio.Event()

    async def _next(self, run: RunRow) -> None:
        self._told = trio.Event()
        self._tell(run, await self._read(run))
        await self._told.wait()

    async def _read(self, run: RunRow) -> bytes:
        assert run.result_blob is not None
        while True:
            try:
                return await self._store.blob(run.result_blob)
            except StoreError as error:
                logger.warning("the result of run %s waits for the disk: %s", run.id, error)
                await trio.sleep(_READ_AGAIN)
