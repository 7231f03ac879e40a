"""The machine's protection: what a runner may use before the kernel says no."""

from __future__ import annotations

import os
import resource
from typing import Final

from taskkit import linux
from taskkit.wire.messages import RunnerSpec

#: Added to a runner's badness, so that the kernel's OOM killer takes the task and not the tree (proc(5)).
_OOM_SCORE: Final = "500"

#: Seconds between the soft and the hard limit of CPU time: SIGXCPU first, so that the cause can be named; with equal
#: limits the kernel sends SIGKILL.
_CPU_MARGIN: Final = 2


def protect(spec: RunnerSpec) -> None:
    """Apply the limits of `spec` to this process and its children."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if spec.cpu_limit is not None:
        hard = spec.cpu_limit + _CPU_MARGIN
        resource.setrlimit(resource.RLIMIT_CPU, (spec.cpu_limit, hard))
    if spec.nice:
        os.nice(spec.nice)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)
    linux.set_no_new_privileges()


def limit_memory(size: int | None) -> None:
    """Set the address space of this process to `size` bytes, or lift an earlier task's limit.

    The limit is soft, so that a process that performs several runs can give each its own; a task could raise it, but
    then isolation from faults is not what it wants.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if size is not None else hard, hard))
