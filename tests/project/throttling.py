"""Tasks with limits that their runs share by key; each returns when it was performed."""

from __future__ import annotations

import time
from pathlib import Path

from taskkit import task


@task(concurrency=1, max_attempts=3)
def narrow(seconds: float = 0.02, gate: str = "") -> list[float]:
    """Take some time, or wait for a file; return the first and the last moment."""
    began = time.monotonic()
    while gate and not Path(gate).exists():
        time.sleep(0.01)
    time.sleep(seconds)
    return [began, time.monotonic()]


@task(rate_limit="3/1s")
def metered() -> float:
    """Return the moment."""
    return time.monotonic()
