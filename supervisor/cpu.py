"""How much CPU a process has used together with those that it has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

#: Ticks of the kernel's clock in a second, in which /proc counts.
_TICKS: Final = os.sysconf("SC_CLK_TCK")

#: Processes that are looked at, at most: the answer must not take longer than a few milliseconds.
_MOST: Final = 200


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU of a process and its living descendants, with those they have waited for.

    What was left to another parent is not counted. A process that is gone has used none.
    """
    return sum(map(_ticks, _family(pid))) / _TICKS


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:  # which grows meanwhile
        found += list(_children(one))[: _MOST - len(found)]
    return found


def _children(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                yield from map(int, file.read().split())
        except OSError:
            continue


def _ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            said = file.read()
    except OSError:
        return 0
    # proc_pid_stat(5): the name may hold spaces and parentheses. Behind it: state, ppid … utime stime cutime cstime.
    return sum(map(int, said.rpartition(b")")[2].split()[11:15]))
