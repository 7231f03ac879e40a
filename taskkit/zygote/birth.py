"""What every new child does before its own work, forked or not."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterable
from typing import Final

import setproctitle

from taskkit import linux

#: Descriptors of ours start here, so that a number which user code closes by mistake (3, 4, 5 …) is not one of them.
FIRST_DESCRIPTOR: Final = 500

#: Weight of a session that performs tasks, as a nice value (sched(7), autogroup).
SESSION_NICE: Final = 10

#: Seconds to wait for the intermediate process of a double fork to go. It has one system call left to make.
_REPARENT_SECONDS: Final = 5.0


class Orphaned(Exception):
    """The supervisor is not this process's parent: nobody would end it."""


def move_descriptors(fds: Iterable[int]) -> list[int]:
    """Move `fds` out of the way of user code and close everything else above stderr; return the new numbers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = FIRST_DESCRIPTOR if soft == resource.RLIM_INFINITY else min(FIRST_DESCRIPTOR, soft // 2)
    moved = [_dup_from(fd, lowest) for fd in fds]
    keep = sorted(moved)
    for low, high in zip([3, *(fd + 1 for fd in keep)], [*keep, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low, high)
    return moved


def _dup_from(fd: int, lowest: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


def reset_signals() -> None:
    """Give every signal its default action and unblock all: a fork inherits the parent's handlers and mask."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # real-time signals that libc keeps for itself
            signal.signal(number, signal.SIG_DFL)
    # Python ignores SIGPIPE itself, and a write to a closed pipe is an exception.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def await_adoption(parent: int, supervisor: int) -> None:
    """Wait until the process that forked this one, `parent`, has gone, and the supervisor is the parent.

    Raises:
      Orphaned: somebody else is; the supervisor has died. Known at once, so that nobody survives it for long.
    """
    deadline = time.monotonic() + _REPARENT_SECONDS
    while (now := os.getppid()) != supervisor:
        if now != parent or time.monotonic() > deadline:
            raise Orphaned(f"the parent is {now}, not the supervisor {supervisor}")
        time.sleep(0.0002)


def die_with(supervisor: int, number: signal.Signals) -> None:
    """Have the kernel send `number` when the supervisor's main thread dies; call when it is the parent.

    Raises:
      Orphaned: it died in between, and the signal will not come.
    """
    linux.set_death_signal(number)
    if os.getppid() != supervisor:
        raise Orphaned("the supervisor died while this process was born")


def reseed() -> None:
    """Make the global random generator this process's own: a fork inherits its state, so siblings would agree."""
    random.seed()


def own_group(*, session: bool) -> None:
    """Become the leader of a process group, so that one kill reaches what user code forks; or of a session."""
    with contextlib.suppress(PermissionError):  # leader already, after an exec with start_new_session
        if session:
            os.setsid()
        else:
            os.setpgid(0, 0)


def lower_session_weight() -> None:
    """Give this session, which is one scheduling group, less weight than the rest of the machine.

    One write: an ordinary user may make ten a second (sched(7), autogroup).
    """
    with contextlib.suppress(OSError):  # a kernel without autogroups
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(SESSION_NICE))


def name_process(title: str, comm: str) -> None:
    """Show `title` in full listings, and `comm` (15 bytes) where ps is brief."""
    setproctitle.setproctitle(title)
    linux.set_comm(comm)


def report_faults(fd: int) -> None:
    """Have Python write its stack to `fd` at a fatal signal. The supervisor reads it after death."""
    faulthandler.disable()  # enabled by the project or PYTHONFAULTHANDLER, it would not take the signals again
    faulthandler.enable(file=fd, all_threads=True)


def no_stdin() -> None:
    """Read end of file from descriptor 0: the terminal is the supervisor's."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0, closefd=False)


def become_subreaper() -> None:
    """Stay the parent of whatever user code starts, daemonised or not, so that it can be attributed."""
    linux.set_subreaper()


def hide() -> None:
    """Keep other processes of this user out of this one's descriptors and memory."""
    linux.set_not_dumpable()
