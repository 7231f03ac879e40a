"""What processes have used: CPU time, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import psutil

#: Seconds between two looks at processes that are to come to rest, and for how long they are looked at.
LOOK = 0.2
PATIENCE = 15.0

#: Part of a core below which they are at rest.
REST = 0.05


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time, user plus system, that processes have used, all of their threads included.

    By their CPU clocks, in nanoseconds: /proc/PID/stat counts in steps of 10 ms, as much as ten subscribers cost.
    """
    # clock_getcpuclockid(3): the clock of a process is the complement of its pid, then 2 for what the scheduler counts.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def memory(pids: Iterable[int]) -> float:
    """Return the bytes that processes hold, what they share counted once (PSS)."""
    return float(sum(psutil.Process(pid).memory_full_info().pss for pid in pids))


def come_to_rest(pids: Iterable[int]) -> None:
    """Wait until processes do nothing: those who have left were seen off, what was garbage has been swept."""
    pids = list(pids)
    end = time.monotonic() + PATIENCE
    used = cpu_seconds(pids)
    while time.monotonic() < end:
        time.sleep(LOOK)
        before, used = used, cpu_seconds(pids)
        if used - before < REST * LOOK:
            return


def with_children(pid: int) -> list[int]:
    """Return a process and all below it."""
    process = psutil.Process(pid)
    found = [pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        found += [child.pid for child in process.children(recursive=True)]
    return found
