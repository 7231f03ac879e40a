"""A task that speaks with a token that is not its own."""

from __future__ import annotations

import json
from typing import Any

from taskkit import current_run, emit, task
from tests.chaos.payload import tick


@task
def chaos_forges(salt: int, n: int, pause: float = 0.0) -> None:
    """Say `n` events; after each, a frame of an attempt that was never ordered."""
    inside: dict[str, Any] = vars(current_run())
    for number in range(1, n + 1):
        emit("tick", tick(salt, number))
        inside["_emitter"].event("nobody's token", "tick", json.dumps(tick(salt, number)).encode())


__all__ = ["chaos_forges"]
