"""Tasks that exceed a limit of their time, each in its own way; all say `ready` first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import anyio

from taskkit import current_run, emit, task
from taskkit.errors import SoftTimeout

#: So short that nobody waits for it, and long enough for a task to say `ready` on a busy machine.
SHORT = 1.0


def _tidied(work: Any) -> Any:
    emit("ready")
    try:
        return work()
    finally:
        emit("tidied", {"cancelled": current_run().cancelled})


@task(soft_timeout=SHORT)
def soft() -> None:
    """Clean up in `finally`."""
    _tidied(lambda: time.sleep(300))


@task(soft_timeout=SHORT)
async def asoft() -> None:
    """Clean up in `finally`, in a coroutine."""
    emit("ready")
    try:
        await anyio.sleep(300)
    finally:
        emit("tidied", {"cancelled": current_run().cancelled})


@task(soft_timeout=SHORT)
def content() -> str:
    """Return what there is when there is no more time."""
    emit("ready")
    try:
        time.sleep(300)
    except SoftTimeout:
        return "partial"
    return "whole"


@task(soft_timeout=SHORT, timeout=2 * SHORT)
def deaf() -> None:
    """Catch whatever asks it to stop, SIGTERM included."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    emit("ready")
    while True:
        try:
            time.sleep(300)
        except BaseException as error:
            emit("asked", {"by": type(error).__name__})


@task(timeout=SHORT)
def halted() -> None:
    """Be stopped as by job control: nothing in this process does anything any more."""
    emit("ready")
    os.kill(os.getpid(), signal.SIGSTOP)


@task(timeout=SHORT)
def summing() -> int:
    """Never come back to the interpreter."""
    emit("ready")
    return sum(range(10**12))


@task(cpu_timeout=SHORT)
def burning() -> None:
    """Use CPU."""
    emit("ready")
    while True:
        pass


@task(cpu_timeout=SHORT)
def burning_child() -> None:
    """Use CPU in another process."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    emit("ready", {"pids": [child.pid]})
    child.wait()


@task(cpu_timeout=SHORT)
def dozing(gate: str) -> str:
    """Use next to no CPU until the file `gate` is there."""
    emit("ready")
    while not os.path.exists(gate):
        time.sleep(0.05)
    return "rested"


@task(stall_timeout=SHORT)
def silent() -> None:
    """Say nothing more."""
    _tidied(lambda: time.sleep(300))


@task(stall_timeout=SHORT)
def silent_and_deaf() -> None:
    """Say nothing more, whoever asks."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    emit("ready")
    while True:
        try:
            time.sleep(300)
        except BaseException:
            continue


@task(stall_timeout=SHORT)
def talkative(gate: str) -> str:
    """Say something again and again until the file `gate` is there."""
    emit("ready")
    while not os.path.exists(gate):
        emit("still here")
        time.sleep(0.05)
    return "said"


@task
def cooperative() -> str:
    """Look whether it was asked to stop, in a thread that nobody interrupts."""
    import contextvars
    import threading

    seen: list[bool] = []
    context = contextvars.copy_context()

    def look() -> None:
        while not current_run().cancelled:
            time.sleep(0.01)
        seen.append(True)

    thread = threading.Thread(target=context.run, args=(look,))
    thread.start()
    emit("ready")
    try:
        while thread.is_alive():
            time.sleep(0.01)
    except BaseException:
        thread.join()
    return "stopped" if seen else "ended"


@task
async def acooperative() -> str:
    """Finish what it is at, then stop by itself."""
    emit("ready")
    with anyio.CancelScope(shield=True):
        while not current_run().cancelled:
            await anyio.sleep(0.01)
    return "stopped"


def _later(exception: BaseException, task_result: Any) -> float:
    return 1.5


@task(max_attempts=2, backoff=_later)
def tries_later() -> int:
    """Raise in the first attempt; the second is a while later."""
    if current_run().attempt == 1:
        raise RuntimeError("not yet")
    return current_run().attempt
