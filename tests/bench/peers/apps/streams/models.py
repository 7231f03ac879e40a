"""Its model; there are no migrations: `migrate --run-syncdb` makes the table."""

from __future__ import annotations

from streaming.models import StreamTask


class Beat(StreamTask):
    """Says that it runs, and that it is done."""

    async def process(self) -> None:
        await self.send_event("start", {})
        await self.send_event("complete", {})
