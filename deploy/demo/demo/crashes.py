"""Ten ways to go wrong, each as nasty as the real thing, for `demo.crash`.

None of them hurts anybody but its own run: that is what the demo is there to show.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

import taskkit

MIB = 1024 * 1024


def segv() -> None:
    """Read address 0."""
    ctypes.string_at(0)


def abort() -> None:
    """Do what a failed assertion in a C library does."""
    os.abort()


def leave() -> None:
    """Leave the process at once, without a word."""
    os._exit(3)


def kill() -> None:
    """Send oneself SIGKILL, as the kernel's OOM killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def oom() -> None:
    """Take memory until there is none: MemoryError at the task's `memory_limit`."""
    taken = []
    try:
        while True:
            taken.append(b"\x01" * (16 * MIB))  # ones, so that the kernel really has to find these pages
    finally:
        taken.clear()  # room for the traceback


def throw() -> None:
    """Raise an ordinary exception."""
    raise ValueError("this task was asked to raise")


class _Endless:
    """Its `repr` asks for its `repr`: C code calls Python calls C code …"""

    def __repr__(self) -> str:
        return repr(self)


def recurse() -> None:
    """Overflow the C stack (SIGSEGV). From Python 3.12 on the interpreter notices: RecursionError."""
    sys.setrecursionlimit(2**31 - 1)
    repr(_Endless())


def close_fds() -> None:
    """Close every descriptor but the first three, then try to speak."""
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    taskkit.emit("still_here", {"closed": True})


def garbage() -> None:
    """Write random bytes to every pipe or socket this process has; regular files are spared."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                if poll.poll(0):  # a full pipe would block us
                    os.write(fd, os.urandom(512))
        except OSError:
            pass  # a reading end, or a socket that leads nowhere


def fork_orphan() -> int:
    """Fork a child with a session of its own, that outlives us by minutes; return its pid."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(300)
        os._exit(0)
    return pid


WAYS: dict[str, Callable[[], Any]] = {
    "segv": segv,
    "abort": abort,
    "exit": leave,
    "kill": kill,
    "oom": oom,
    "raise": throw,
    "recursion": recurse,
    "close_fds": close_fds,
    "garbage": garbage,
    "fork_orphan": fork_orphan,
}
