"""Tasks in a module of any name, as Django's interface allows."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.interface.package import task


@task(queue_name="mail")
def confirm(order: int, to: str) -> dict[str, Any]:
    """Return what was sent."""
    return {"order": order, "to": to, "pid": os.getpid()}


@task
async def later(value: Any) -> Any:
    """Return the value, from a coroutine."""
    return value


@task(takes_context=True, priority=5)
def contextual(context: Any, word: str = "x") -> dict[str, Any]:
    """Return what the context says."""
    result = context.task_result
    return {
        "attempt": context.attempt,
        "id": result.id,
        "args": result.args,
        "kwargs": result.kwargs,
        "status": str(result.status),
        "workers": result.worker_ids,
        "word": word,
    }


@task
def archive(size: int) -> list[str]:
    """Return a value that no frame of a pipe has room for."""
    return ["é" * 1000] * (size // 2000)


@task(takes_context=True)
def speak(context: Any, words: list[str]) -> int:
    """Say the words to whoever listens; see `taskkit.emit` for what a context of ours can do."""
    for number, word in enumerate(words, 1):
        context.emit("word", {"word": word})
        context.progress(number, len(words))
    return len(words)


@task
def remember(*args: Any, **kwargs: Any) -> Any:
    """Return what it is given by the name `value`."""
    return kwargs.get("value")


@task
def leave() -> None:
    """Leave as a command does."""
    raise SystemExit(3)


@task
def tangled() -> None:
    """Raise what cannot be pickled, nor made anew from its text."""
    raise ValueError('ValueError("deep")') from RuntimeError(lambda: None)


@task
def opaque() -> Any:
    """Return what JSON does not have."""
    return {"a": lambda: 1}


@task
def fail(message: str) -> None:
    """Raise."""
    raise LookupError(message)


@task
def die() -> None:
    """Crash the process."""
    os.kill(os.getpid(), signal.SIGSEGV)


@task(queue_name="slow")
def sleep(seconds: float) -> None:
    """Take so long."""
    time.sleep(seconds)
