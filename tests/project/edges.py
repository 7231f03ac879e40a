"""A task for tests/edges that says what it is told to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from taskkit import emit, task


@task
def say(
    first: list[tuple[str, Any]],
    then: list[tuple[str, Any]] | None = None,
    gate: str | None = None,
    prints: list[str] | None = None,
) -> str:
    """Emit `first`, wait until the file `gate` is there, print, emit `then`."""
    for type, data in first:
        emit(type, data)
    while gate is not None and not Path(gate).exists():
        time.sleep(0.01)
    for line in prints or []:
        print(line, flush=True)
    for type, data in then or []:
        emit(type, data)
    return "said"
