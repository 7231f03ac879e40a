"""Task rows of every shape: sync, async, and their generators.

There are no migrations: `migrate --run-syncdb` makes the tables.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio
import anyio.lowlevel
from django.db import models

from taskkit import StreamTask


class Row(StreamTask):
    """Counts to `steps` in a plain function."""

    message = models.CharField(max_length=100)
    steps = models.PositiveIntegerField(default=3)

    def process(self) -> str:
        for step in range(1, self.steps + 1):
            self.send_event_sync("progress", {"step": step, "total_steps": self.steps})
        return self.message


class ARow(StreamTask):
    """Counts to `steps` in a coroutine, `pause` seconds a step."""

    message = models.CharField(max_length=100)
    steps = models.PositiveIntegerField(default=3)
    pause = models.FloatField(default=0.0)

    async def process(self) -> str:
        await self.send_event("start", {"message": self.message})
        for step in range(1, self.steps + 1):
            await anyio.sleep(self.pause)
            await self.send_event("progress", {"step": step, "total_steps": self.steps})
        await self.send_event("complete", {"message": self.message})
        return self.message


class GenRow(StreamTask):
    """Yields its events."""

    steps = models.PositiveIntegerField(default=3)

    def process(self) -> Iterator[dict[str, int]]:
        for step in range(1, self.steps + 1):
            yield {"step": step}


class AGenRow(StreamTask):
    """Yields its events asynchronously."""

    steps = models.PositiveIntegerField(default=3)

    async def process(self) -> AsyncIterator[dict[str, int]]:
        for step in range(1, self.steps + 1):
            await anyio.lowlevel.checkpoint()
            yield {"step": step}


class BadRow(StreamTask):
    """Always raises."""

    def process(self) -> None:
        raise ValueError("this row is bad")
