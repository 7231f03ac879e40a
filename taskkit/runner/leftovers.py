"""Ends the processes that an attempt has left behind in a runner that lives on.

The runner is a subreaper, so whatever an attempt started, daemonised or not, is its child sooner or later. In a
runner of one run the supervisor does this when the runner has left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final

from taskkit import linux

#: Seconds for all of them to die. SIGKILL takes effect at once, but for a process that waits inside the kernel.
_SECONDS: Final = 2.0

_LOOK: Final = 0.001


def end_children() -> int:
    """Kill and reap every child of this process, and theirs as they come to it; return how many were alive."""
    with contextlib.suppress(ChildProcessError):  # most have none, which takes one system call to know
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return _end_children()
    return 0


def _end_children() -> int:
    killed: set[int] = set()
    deadline = time.monotonic() + _SECONDS
    while (children := linux.children()) and time.monotonic() < deadline:
        for pid in children:
            with contextlib.suppress(ChildProcessError):  # a thread of the task's may be waiting for it
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(_LOOK)
    return len(killed)
