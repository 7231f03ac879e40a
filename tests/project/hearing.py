"""Tasks that wait for what others tell them."""

from __future__ import annotations

import threading
from typing import Any

from taskkit import current_run, emit, task


@task(max_attempts=3, backoff=lambda error, run: 0.0)
def ask(name: str = "answer", n: int = 1, timeout: float | None = 30.0, fail: int = 0) -> list[Any]:
    """Take `n` messages; raise behind them in the first `fail` attempts."""
    run = current_run()
    heard = []
    for _ in range(n):
        emit("asking", {"n": len(heard) + 1})
        heard.append(run.inbox(name).get(timeout=timeout))
    if run.attempt <= fail:
        raise ValueError("again")
    return heard


@task
def ask_in_thread() -> Any:
    """Take a message in a thread while the main thread waits for that."""
    inbox, heard = current_run().inbox("answer"), []
    thread = threading.Thread(target=lambda: heard.append(inbox.get(timeout=30)))
    emit("asking")
    thread.start()
    thread.join()
    return heard[0]


@task(loop="asyncio")
async def ask_async(n: int = 1, timeout: float | None = 30.0) -> list[Any]:
    """Take `n` messages under asyncio."""
    inbox = current_run().inbox("answer")
    emit("asking")
    return [await inbox.aget(timeout=timeout) for _ in range(n)]


@task(loop="trio")
async def ask_trio(n: int = 1) -> list[Any]:
    """Take `n` messages under trio."""
    inbox = current_run().inbox("answer")
    emit("asking")
    return [await inbox.aget(timeout=30) for _ in range(n)]
