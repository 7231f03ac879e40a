"""Tasks that stop when they are asked to, or do not: each tells `ready` with the processes that it has made."""

from __future__ import annotations

import collections
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import anyio
import anyio.to_thread

from taskkit import emit, task

#: A program that does not mind SIGTERM, nor leave at the end of its parent.
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"
)


def _loop_in_c() -> None:
    """Never come back to the interpreter, with the GIL in hand."""
    collections.deque(itertools.repeat(None), maxlen=0)


@task
def c_loop() -> None:
    """Hold the GIL in a loop of C, in a plain function."""
    emit("ready", {"pids": []})
    _loop_in_c()


@task
async def ac_loop() -> None:
    """Hold the GIL in a loop of C, in a coroutine."""
    emit("ready", {"pids": []})
    _loop_in_c()


@task
def swallow() -> str:
    """Catch every Exception there is, again and again."""
    emit("ready", {"pids": []})
    while True:
        try:
            time.sleep(300)
        except Exception:  # what cancels is none
            emit("caught")


@task
def slow_gen() -> Iterator[dict[str, int]]:
    """Yield, wait, clean up."""
    yield {"pids": []}  # type: ignore[dict-item]
    try:
        time.sleep(300)
    finally:
        emit("cleaned_up")


@task
async def slow_agen() -> AsyncIterator[dict[str, int]]:
    """Yield, wait, clean up."""
    yield {"pids": []}  # type: ignore[dict-item]
    try:
        await anyio.sleep(300)
    finally:
        emit("cleaned_up")


@task
async def in_thread() -> None:
    """Wait for a thread that cannot be cancelled."""
    emit("ready", {"pids": []})
    await anyio.to_thread.run_sync(time.sleep, 300)


@task
def with_child() -> None:
    """Wait for a program."""
    child = subprocess.Popen(["sleep", "300"])
    emit("ready", {"pids": [child.pid]})
    child.wait()


@task
def busy_loop() -> None:
    """Count for ever, in Python."""
    emit("ready")
    number = 0
    try:
        while True:
            number += 1
    finally:
        emit("cleaned_up")


#: Programs three deep, the last two in sessions of their own; each says its id.
TREE = (
    "import os, subprocess, sys, time; depth = int(sys.argv[1]); print(os.getpid(), flush=True); "
    "depth and subprocess.Popen([sys.executable, '-c', sys.argv[2], str(depth - 1), sys.argv[2]], "
    "start_new_session=True); time.sleep(300)"
)


@task
def with_tree() -> None:
    """Wait for a program that has started another, which has started a third."""
    child = subprocess.Popen([sys.executable, "-c", TREE, "2", TREE], stdout=subprocess.PIPE)
    assert child.stdout is not None
    emit("ready", {"pids": [int(child.stdout.readline()) for _ in range(3)]})
    child.wait()


@task
def with_deaf_child() -> None:
    """Wait for a program that does not mind SIGTERM."""
    child = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # it is deaf from here on
    emit("ready", {"pids": [child.pid]})
    child.wait()


@task
async def with_async_child() -> None:
    """Wait for a program in a coroutine."""
    async with await anyio.open_process(["sleep", "300"]) as child:
        emit("ready", {"pids": [child.pid]})
        await child.wait()
