"""Why a runner died: one cause out of all that is known of its death. Pure."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Final

from taskkit.wire.messages import Cause

#: Exit codes of a runner itself (taskkit.zygote.roles, taskkit.runner.emitter), not of user code.
_OWN_EXITS: Final = {
    70: ("boot", "the runner could not start"),
    71: ("descriptors", "the task closed descriptors of its runner, which could no longer speak"),
    75: ("lost", "the supervisor had gone when the runner was born"),
}

#: What a kill was ordered for, in a sentence.
_ORDERED: Final = {
    "timeout": "the attempt exceeded its timeout and was ended",
    "cpu_timeout": "the attempt used up its cpu_timeout and was ended",
    "stall_timeout": "the attempt sent no event for its stall_timeout, did not stop when asked to, and was ended",
    "cancelled": "the task did not stop within its grace after a cancellation and was ended",
    "stopped": "the tree stops, and the task did not stop within its grace",
    "corrupt": "the task wrote bytes of its own into its runner's events pipe",
    "operator": "an operator ended the runner",
    "abandoned": "nothing was left on the runner but attempts that had been ended without it",
}


@dataclass(frozen=True, slots=True)
class Death:
    """What is known about one dead process.

    Attributes:
      status: as from waitpid.
      max_rss: bytes.
      cpu: seconds.
      ordered: why the supervisor ended it, or "" when it did not.
      faults: what faulthandler wrote.
      oom_kills: how many OOM kills the kernel counted in our memory cgroup since the last death, None if unknown.
      memory_pressure: whether the machine's memory was nearly used up.
      cpu_limit: seconds of CPU after which the kernel sends SIGXCPU; SIGKILL follows a little later.
    """

    status: int
    max_rss: int = 0
    cpu: float = 0.0
    ordered: str = ""
    detail: str = ""
    faults: str = ""
    oom_kills: int | None = None
    memory_pressure: bool = False
    cpu_limit: int | None = None


def signal_name(number: int) -> str:
    """Return SIGSEGV for 11, SIG99 for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def classify(death: Death) -> Cause:
    """Return the cause of a death. What the supervisor ordered stands over what the kernel says."""
    signalled = os.WIFSIGNALED(death.status)
    name = signal_name(os.WTERMSIG(death.status)) if signalled else None
    code = os.WEXITSTATUS(death.status) if os.WIFEXITED(death.status) else None
    kind, detail = _kind(death, name, code)
    return Cause(
        kind=kind,
        signal=name,
        exit_code=code,
        max_rss=death.max_rss,
        cpu=death.cpu,
        traceback=death.faults,
        detail=death.detail or detail,
    )


def _kind(death: Death, name: str | None, code: int | None) -> tuple[str, str]:
    if death.ordered:
        return death.ordered, _ORDERED.get(death.ordered, f"ended by the supervisor: {death.ordered}")
    if name is not None:
        return _kind_of_signal(death, name)
    if code in _OWN_EXITS:
        kind, detail = _OWN_EXITS[code]
        last = death.faults.strip().rpartition("\n")[2]  # of a traceback, the exception
        return kind, f"{detail}: {last}" if last and kind == "boot" else detail
    if code == 0:
        return "no_result", "the process left with exit code 0, but without a result"
    return "exit", f"the process left with exit code {code} in the middle of the task"


def _kind_of_signal(death: Death, name: str) -> tuple[str, str]:
    if name == "SIGXCPU":
        return "cpu_limit", "the process used up its CPU time (RLIMIT_CPU)"
    if name == "SIGXFSZ":
        return "signal", "the process wrote more into a file than it may (SIGXFSZ, RLIMIT_FSIZE)"
    if name == "SIGKILL":
        # setrlimit(2): SIGXCPU at the soft limit, which a task may catch; SIGKILL at the hard one.
        if death.cpu_limit is not None and death.cpu >= death.cpu_limit and not death.oom_kills:
            return (
                "cpu_limit",
                "the process ignored SIGXCPU and used up its CPU time to the last (RLIMIT_CPU)",
            )
        if death.oom_kills:
            return "oom", "the kernel's OOM killer ended the process (its memory cgroup counted the kill)"
        if death.oom_kills is None and death.memory_pressure:
            return "oom_suspected", "SIGKILL that nobody of ours sent while memory was nearly used up"
        return "signal", "SIGKILL from outside: nobody of ours sent it, and no OOM kill was counted"
    if name == "SIGTERM":
        return "signal", "SIGTERM from outside: nobody of ours sent it"
    return "signal", f"the process died of {name}"
