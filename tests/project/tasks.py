"""Small functions that the tests submit, one behaviour each."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel

from taskkit import RunCancelled, current_run, emit, linux, progress, task
from tests.project.bench import *  # noqa: F403  (a task is found where `tasks` offers it)
from tests.project.chaos import *  # noqa: F403
from tests.project.clockwork import *  # noqa: F403
from tests.project.edges import *  # noqa: F403
from tests.project.families import *  # noqa: F403
from tests.project.forging import *  # noqa: F403
from tests.project.hearing import *  # noqa: F403
from tests.project.limits import *  # noqa: F403
from tests.project.querying import *  # noqa: F403
from tests.project.stopping import *  # noqa: F403
from tests.project.throttling import *  # noqa: F403


@task
def echo(value: Any = None) -> Any:
    """Return what came."""
    return value


@task
def add(a: int, b: int) -> int:
    """Return the sum of two integers."""
    return a + b


@task
def boom(message: str = "boom") -> None:
    """Raise."""
    raise ValueError(message)


@task
def count(n: int, delay: float = 0.0) -> int:
    """Emit `n` events, `delay` seconds before each."""
    for step in range(1, n + 1):
        time.sleep(delay)
        emit("progress", {"step": step, "total": n})
    return n


@task
def report(n: int) -> None:
    """Call the `progress()` helper `n` times."""
    for step in range(1, n + 1):
        progress(step, n, f"step {step}")


@task
def telling(n: int, delay: float, ask: bool = False) -> dict[str, int]:
    """Tell of `n` parts in every way: an event, a printed line, progress; then go on when told to, if it is to ask."""
    for number in range(1, n + 1):
        time.sleep(delay)
        emit("part", {"number": number})
        print(f"printed {number}")
        progress(number, n, f"part {number}")
    if ask:
        current_run().inbox("go").get(timeout=60)
    return {"parts": n}


@task
def sleepy(seconds: float) -> str:
    """Sleep without a word, in a plain function."""
    time.sleep(seconds)
    return "slept"


@task(on_lost="fail")
def once(seconds: float) -> str:
    """Sleep; never to be done twice."""
    time.sleep(seconds)
    return "slept"


@task
async def asleepy(seconds: float) -> str:
    """Sleep without a word, in a coroutine."""
    await anyio.sleep(seconds)
    return "slept"


@task
def spin(seconds: float) -> int:
    """Burn a core."""
    end = time.monotonic() + seconds
    turns = 0
    while time.monotonic() < end:
        turns += 1
    return turns


@task
def gen(n: int) -> Iterator[dict[str, int]]:
    """Yield `n` events."""
    for step in range(1, n + 1):
        yield {"step": step}


@task
async def agen(n: int) -> AsyncIterator[dict[str, int]]:
    """Yield `n` events asynchronously."""
    for step in range(1, n + 1):
        await anyio.lowlevel.checkpoint()
        yield {"step": step}


@task
def patient(seconds: float = 60.0) -> None:
    """Say `ready`, wait; clean up with an event when cancelled, which may be before `emit` returns."""
    try:
        emit("ready")
        time.sleep(seconds)
    except RunCancelled:
        emit("cleaned_up")
        raise


@task(on_disconnect="cancel")
def shy(seconds: float = 60.0) -> None:
    """Say `ready`, wait; not without a subscriber."""
    patient(seconds)


@task
async def apatient(seconds: float = 60.0) -> None:
    """Say `ready`, wait; clean up with an event when cancelled."""
    emit("ready")
    try:
        await anyio.sleep(seconds)
    except anyio.get_cancelled_exc_class():
        emit("cleaned_up")
        raise


@task
def stubborn(seconds: float = 60.0) -> None:
    """Ignore every polite way of being told to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = time.monotonic() + seconds
    told = False
    while time.monotonic() < end:
        try:
            if not told:
                told = True
                emit("ready")  # within: it may be cancelled before this returns
            time.sleep(max(0.0, end - time.monotonic()))
        except RunCancelled:
            emit("ignored")


def _at_once(exception: BaseException, task_result: Any) -> float:
    return 0.0


@task(max_attempts=3, backoff=_at_once)
def flaky(succeed_on: int) -> int:
    """Raise in every attempt before number `succeed_on`."""
    attempt = current_run().attempt
    if attempt < succeed_on:
        raise RuntimeError(f"attempt {attempt} fails")
    return attempt


@task
def whoami() -> dict[str, Any]:
    """Return the run as its own task sees it, plus its process."""
    run = current_run()
    return {
        "id": run.id,
        "attempt": run.attempt,
        "task": run.task,
        "metadata": run.metadata,
        "pid": os.getpid(),
        "ppid": os.getppid(),
    }


@task
def chatty(lines: int = 3) -> None:
    """Print to stdout."""
    for number in range(1, lines + 1):
        print(f"line {number}")


@task
def die(number: int = signal.SIGKILL) -> None:
    """Send this process a signal."""
    emit("ready")
    os.kill(os.getpid(), number)


@task
def daemonise(seconds: float = 60.0) -> None:
    """Start a program in a session of its own, tell its pid, and go on working."""
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    emit("daemon", {"pid": child.pid})
    time.sleep(seconds)


@task
def daemonise_by_fork(seconds: float = 60.0) -> None:
    """As `daemonise`, but the daemon is a fork of this process that never becomes another program."""
    if (between := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
    os.waitpid(between, 0)
    (pid,) = linux.children()  # it has come to us: a runner is a subreaper
    emit("daemon", {"pid": pid})
    time.sleep(seconds)


class Unprintable:
    """Its `repr` raises, as a lazy query's does when its database is away."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@task
def unprintable() -> Unprintable:
    """Return what can neither be stored nor shown."""
    return Unprintable()


@task
def leave(code: int) -> None:
    """End the process at once, with any exit code."""
    os._exit(code)


@task(max_attempts=3, backoff=lambda exception, task_result: float("inf"))
def hopeless() -> None:
    """Fail, and ask for another attempt at the end of time."""
    raise ValueError("hopeless")


@task
def bulky(events: list[int] | None = None, result: int = 0, pause: float = 0.0) -> str:
    """Emit events of these many characters, return a result of so many; wait before."""
    time.sleep(pause)
    for size in events or []:
        emit("bulk", {"text": "x" * size})
    return "x" * result


@task
def paced(n: int, size: int, delay: float, before: int = 0, gate: str | None = None) -> int:
    """Emit `before` events of 4,000 characters at once, then `n` of `size` characters, `delay` seconds apart.

    In between wait until there is a file `gate`. Each of the `n` says the time and has one `~` (tests.bench.readers).
    """
    for _ in range(before):
        emit("before", {"text": "x" * 4_000})
    while gate is not None and not os.path.exists(gate):
        time.sleep(0.01)
    for number in range(1, n + 1):
        emit("paced", {"number": number, "at": time.time(), "text": "~".ljust(size, "x")})
        time.sleep(delay)
    return n


@task
def die_while(path: str) -> str:
    """Die of a segmentation fault as long as the file `path` is there."""
    if os.path.exists(path):
        os.kill(os.getpid(), signal.SIGSEGV)
    return "survived"


@task
async def adie(after: float = 0.0, number: int = signal.SIGSEGV) -> None:
    """Say `ready`, wait, send this process a signal: in a shared process, others die of it."""
    emit("ready")
    await anyio.sleep(after)
    os.kill(os.getpid(), number)


@task
async def astubborn(seconds: float = 60.0) -> str:
    """Say `ready`, wait, hear of no cancellation."""
    emit("ready")
    with anyio.CancelScope(shield=True):
        await anyio.sleep(seconds)
    return "slept"


@task
def spin_on(seconds: float) -> None:
    """Burn a core, whatever the kernel says about it."""
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    spin(seconds)
