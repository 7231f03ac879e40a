"""Tasks with the options that Django is adopting, by the decorator that has them on every version of Django."""

from __future__ import annotations

from typing import Any

from taskkit.backend import task


def _at_once(exception: BaseException, task_result: Any) -> float:
    return 0.0


@task(takes_context=True, max_attempts=3, backoff=_at_once, metadata={"colour": "red"})
def flaky(context: Any, succeed_on: int) -> dict[str, Any]:
    """Fail until the given attempt."""
    if context.attempt < succeed_on:
        raise ConnectionError(f"attempt {context.attempt}")
    return {"attempt": context.attempt, "metadata": context.metadata}


@task(timeout=0.5)
def endless() -> None:
    """Run into the time limit."""
    while True:
        pass
