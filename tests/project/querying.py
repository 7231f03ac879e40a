"""Tasks that ask the database."""

from __future__ import annotations

import os
import time

from taskkit import task


@task
def ask_rows(gate: str = "") -> int:
    """Count the rows; hold the connection until there is a file `gate`."""
    from tests.project.models import Row

    found = Row.objects.count()
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return found


@task
async def ask_rows_async() -> int:
    """Count the rows as Django does it in a coroutine."""
    from tests.project.models import Row

    return await Row.objects.acount()
