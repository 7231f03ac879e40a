"""Tasks for tests/chaos: each tells numbered events that a judge can recompute.

They note durably how far they came in the file that BULKHEAD_CHAOS_NOTES names, so that the judge knows what must
have been delivered. A line is `run attempt pid word n salt`; short lines appended with O_APPEND do not mix.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio

from taskkit import current_run, emit, progress, task
from tests.chaos.payload import pad, tick

#: Event descriptors of a runner begin here (DESIGN 3.1).
_EVENT_FDS = 500


def _note(word: str, n: int, salt: int) -> None:
    path = os.environ.get("BULKHEAD_CHAOS_NOTES")
    if path is None:
        return
    run = current_run()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{run.id} {run.attempt} {os.getpid()} {word} {n} {salt}\n".encode())
    finally:
        os.close(fd)


def _soon(exception: BaseException, task_result: Any) -> float:
    return 0.1


def _ticks(salt: int, n: int, pause: float, scale: int = 1) -> Iterator[int]:
    """Say and note events 1 to `n`; yield after each."""
    _note("begun", 0, salt)
    for number in range(1, n + 1):
        emit("tick", tick(salt, number, scale))
        _note("said", number, salt)
        yield number
        if pause:
            time.sleep(pause)


def _say(salt: int, n: int, pause: float, scale: int = 1) -> None:
    for _ in _ticks(salt, n, pause, scale):
        pass


@task(max_attempts=3, backoff=_soon)
def chaos_ticks(salt: int, n: int, pause: float = 0.0, scale: int = 1) -> dict[str, Any]:
    """Say `n` events; return something that can be recomputed."""
    _say(salt, n, pause, scale)
    return {"n": n, "pad": pad(salt, 0, scale)}


@task(max_attempts=3, backoff=_soon)
async def chaos_aticks(salt: int, n: int, pause: float = 0.0) -> dict[str, Any]:
    """Say `n` events from a coroutine."""
    for _ in _ticks(salt, n, 0.0):
        await anyio.sleep(pause)
    return {"n": n, "pad": pad(salt, 0)}


@task(max_attempts=3, backoff=_soon)
async def chaos_yields(salt: int, n: int, pause: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    """Yield `n` events."""
    _note("begun", 0, salt)
    for number in range(1, n + 1):
        yield tick(salt, number)
        _note("said", number, salt)
        await anyio.sleep(pause)


@task(max_attempts=3, backoff=_soon)
def chaos_talks(salt: int, n: int, pause: float = 0.0) -> None:
    """Print and report progress between the events."""
    for number in _ticks(salt, n, pause):
        print(f"line {number} of {salt}")
        progress(number, n)


@task
def chaos_fails(salt: int, n: int, pause: float = 0.0) -> None:
    """Raise after the last event."""
    _say(salt, n, pause)
    raise ValueError(f"salt {salt} fails")


@task(max_attempts=6, backoff=_soon)
def chaos_retries(salt: int, n: int, pause: float = 0.0) -> None:
    """Raise in the first attempt, return in the next."""
    _say(salt, n, pause)
    if current_run().attempt == 1:
        raise ValueError(f"salt {salt} fails at first")


@task
def chaos_segfaults(salt: int, n: int, pause: float = 0.0) -> None:
    """Die of SIGSEGV after the last event."""
    _say(salt, n, pause)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


@task(max_attempts=3, backoff=_soon)
def chaos_forks(salt: int, n: int, pause: float = 0.0) -> None:
    """Leave a child, and a daemon that holds every descriptor of the runner."""
    _note("begun", 0, salt)
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
    _say(salt, n, pause)


def _is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


@task
def chaos_scribbles(salt: int, n: int, pause: float = 0.0) -> None:
    """Write garbage into the runner's own pipes after the last event."""
    _say(salt, n, pause)
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        fd = int(name)
        if fd >= _EVENT_FDS and Path(f"/proc/self/fd/{name}").exists() and _is_pipe(fd):
            os.write(fd, b"\x00garbage\xff" * (1 + salt % 50))
    time.sleep(5)


__all__ = [
    "chaos_aticks",
    "chaos_fails",
    "chaos_forks",
    "chaos_retries",
    "chaos_scribbles",
    "chaos_segfaults",
    "chaos_talks",
    "chaos_ticks",
    "chaos_yields",
]
