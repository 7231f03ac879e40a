"""Tasks that are measured: their bodies are those of the peers, or as little as can be."""

from __future__ import annotations

import fcntl
import os
import time

import anyio

from taskkit import emit, task
from tests.project import stamps

__all__ = ["bench_die", "bench_pulse", "bench_speak", "bench_stamp"]


@task
def bench_stamp(path: str) -> None:
    """Say when the body began, which is all: a no-op that leaves a trace."""
    stamps.stamp(path)


@task
def bench_die(path: str, number: int) -> None:
    """Say when, then die of a signal."""
    stamps.die(path, number)


@task
async def bench_pulse(seconds: float) -> None:
    """Speak three times, and sleep in between, `seconds` altogether."""
    emit("pulse", {"beat": 1})
    await anyio.sleep(seconds / 2)
    emit("pulse", {"beat": 2})
    await anyio.sleep(seconds / 2)
    emit("pulse", {"beat": 3})


@task
def bench_speak(n: int, size: int, gate: str) -> float:
    """Wait until nobody holds the lock of the file `gate`, emit `n` events; return the seconds of CPU they took."""
    emit("ready")
    descriptor = os.open(gate, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(
        descriptor, fcntl.LOCK_SH
    )  # asleep in the kernel: a hundred that look again and again would be load
    before = time.process_time()
    for number in range(n):
        emit("spoken", {"number": number, "text": "x" * size})
    return time.process_time() - before
