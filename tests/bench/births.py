"""What a new runner costs: by fork from a zygote, beside the exec that it replaces."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import trio

from supervisor.child import Child
from supervisor.config import Config
from supervisor.runners import Ends, open_ends
from supervisor.zygote_client import Zygote
from taskkit import linux
from taskkit.settings import PoolSettings
from taskkit.wire.messages import RunnerSpec
from tests.bench.figures import Figure, at_most, figure, ratio
from tests.helpers import ROOT

#: Runners made by one order, as the supervisor's pool does it.
TOGETHER = 4

#: Forks between two execs, so that both meet the same weather on the machine.
FORKS_PER_EXEC = 5

#: Seconds that any one birth may take before the benchmark gives up.
PATIENCE = 30.0

SETTINGS = "bulkhead_demo.settings"
PROJECT = ROOT / "deploy" / "demo"

#: Says so when Django is set up, then stays to have its memory looked at.
EXEC = "import django, sys; django.setup(); print(flush=True); sys.stdin.read()"


@dataclass(slots=True)
class Births:
    """Samples: seconds until the first byte, bytes of private memory."""

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    execs: list[float] = field(default_factory=list)
    fork_memory: list[float] = field(default_factory=list)
    exec_memory: list[float] = field(default_factory=list)


@contextmanager
def demo_environment() -> Iterator[None]:
    """Give the demo project a directory of its own for its database."""
    before = {name: os.environ.get(name) for name in ("BULKHEAD_DEMO_DIR", "DJANGO_SETTINGS_MODULE")}
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as folder:
        os.environ |= {"BULKHEAD_DEMO_DIR": folder, "DJANGO_SETTINGS_MODULE": SETTINGS}
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def private_memory(pid: int) -> int | None:
    """Return the bytes that only this process has (USS), or None when it may not be looked into."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return None


async def fork(zygote: Zygote, count: int, births: Births) -> float:
    """Fork `count` runners by one order; return the seconds until the last one's first byte (its Hello)."""
    made = [open_ends() for _ in range(count)]
    blobs = os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    nice = PoolSettings().nice
    specs = [RunnerSpec(id=f"b-{i}", nice=nice, pipe_size=ends.pipe_size) for i, ends in enumerate(made)]
    fds = [fd for ends in made for fd in (*ends.far, ends.faults, blobs)]
    born: list[tuple[int, int]] = []

    async def order() -> None:
        born.extend(await zygote.fork(specs, fds))

    try:
        begun = time.perf_counter()
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(order)
                for ends in made:
                    nursery.start_soon(trio.lowlevel.wait_readable, ends.near[0])
        took = time.perf_counter() - begun
    finally:
        os.close(blobs)
        for ends in made:
            ends.close_far()
    births.fork_memory += [size for pid, _ in born if (size := private_memory(pid)) is not None]
    await dismiss(made, born)
    return took


async def dismiss(made: list[Ends], born: list[tuple[int, int]]) -> None:
    """Close the runners' orders, which ends them; return when they are reaped."""
    for ends in made:
        for fd in ends.near:
            trio.lowlevel.notify_closing(fd)
        ends.close_near()
    for pid, pidfd in born:
        with trio.fail_after(PATIENCE):
            await Child("runner", pid, pidfd, group=True).wait()


def execute(births: Births) -> float:
    """Start Python afresh and set Django up; return the seconds until its first byte."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", EXEC], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - begun
        memory = private_memory(process.pid)
        process.stdin.close()
    if memory is not None:
        births.exec_memory.append(memory)
    return took


async def measure(repetitions: int) -> Births:
    """Alternate forks and execs; `repetitions` counts the forks that are made one by one."""
    births = Births()
    zygote = Zygote(Config(settings_module=SETTINGS, path=(str(PROJECT),), demo=True, quiet=True))
    async with trio.open_nursery() as nursery:
        await nursery.start(zygote.run)
        for _ in range(2):  # the first child touches pages that all later ones find touched
            await fork(zygote, 1, Births())
        for _ in range(math.ceil(repetitions / FORKS_PER_EXEC)):
            births.execs.append(await trio.to_thread.run_sync(execute, births))
            for _ in range(FORKS_PER_EXEC):
                births.alone.append(await fork(zygote, 1, births))
            births.together.append(await fork(zygote, TOGETHER, births))
        nursery.cancel_scope.cancel()
    return births


def figures_of(births: Births) -> list[Figure]:
    """Return what is printed: times in ms, rates per second, memory in MiB."""
    rounds = range(len(births.execs))
    forks = [births.alone[i * FORKS_PER_EXEC : (i + 1) * FORKS_PER_EXEC] for i in rounds]
    medians = [sorted(some)[len(some) // 2] for some in forks]
    mib = 1024 * 1024
    return [
        figure("fork -> first byte, one by one", "ms", [s * 1e3 for s in births.alone]),
        figure("forks/s, one by one", "1/s", [1 / s for s in births.alone]),
        figure(f"forks/s, in {TOGETHER}s", "1/s", [TOGETHER / s for s in births.together]),
        figure("peer: exec + django.setup() -> first byte", "ms", [s * 1e3 for s in births.execs]),
        ratio("fork / exec, time", medians, births.execs),
        figure(
            "private memory of a new runner (USS)", "MiB", [b / mib for b in births.fork_memory], at_most(6.0)
        ),
        figure("peer: private memory after exec (USS)", "MiB", [b / mib for b in births.exec_memory]),
    ]


def run(repetitions: int) -> list[Figure]:
    """Measure in this process, which becomes the runners' parent."""
    linux.set_subreaper()
    with demo_environment():
        return figures_of(trio.run(measure, repetitions))
