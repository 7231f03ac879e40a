"""A task that is a row of the database."""

from __future__ import annotations

import anyio
from django.core.validators import MinValueValidator
from django.db import models

from taskkit import StreamTask

STEPS = 3


class ExampleTask(StreamTask):
    """Takes three steps, telling about each.

    The row holds what the task needs (`message`) and, when it has ended, what came out (`final_value`).
    `anyio.sleep` rather than `asyncio.sleep`: so it runs under asyncio or trio, whatever its pool uses.
    """

    message = models.CharField(max_length=255)
    step_seconds = models.FloatField(default=2.0, validators=[MinValueValidator(0.0)])

    def __str__(self) -> str:
        return self.message

    async def process(self) -> str:
        """Send `start`, a `progress` per step, `complete`; what is returned becomes `final_value`."""
        await self.send_event("start", {"message": f"Starting: {self.message}"})
        for step in range(1, STEPS + 1):
            await anyio.sleep(self.step_seconds)
            text = f"Step {step} of {STEPS}: {self.message}"
            await self.send_event("progress", {"step": step, "total_steps": STEPS, "message": text})
        outcome = f"Done: {self.message}"
        await self.send_event("complete", {"message": outcome})
        return outcome
