"""The only tables that say how runs, attempts or processes change their state.

Rule 1: every transition is in a table here. Code elsewhere names events, never target states.

Rule 2: this module does not know who asks. Gateway, courier and a Django row replay the same tables, so they
cannot disagree.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from taskkit.errors import LifecycleError


class RunStatus(enum.StrEnum):
    """State of a run: django.tasks' four words plus CANCELLED."""

    #: waits for a runner, for its time, or for its next attempt
    READY = "READY"
    #: a runner has said `Started` for the current attempt
    RUNNING = "RUNNING"
    #: an attempt returned
    SUCCESSFUL = "SUCCESSFUL"
    #: gave up: raised, crashed, timed out or was lost, and no attempt is left
    FAILED = "FAILED"
    #: somebody wanted it to stop, and it has stopped
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended for good."""
        return self in TERMINAL


TERMINAL: Final = frozenset({RunStatus.SUCCESSFUL, RunStatus.FAILED, RunStatus.CANCELLED})


class RunEvent(enum.Enum):
    """What can happen to a run."""

    START = enum.auto()
    SUCCEED = enum.auto()
    FAIL = enum.auto()
    CANCEL = enum.auto()
    #: the attempt ended badly and counts; another one follows
    RETRY = enum.auto()
    #: the attempt ended through no fault of the task; another one follows, uncounted
    PUT_BACK = enum.auto()


RUN_TRANSITIONS: Final[Mapping[RunStatus, Mapping[RunEvent, RunStatus]]] = {
    RunStatus.READY: {
        RunEvent.START: RunStatus.RUNNING,
        RunEvent.CANCEL: RunStatus.CANCELLED,
        RunEvent.FAIL: RunStatus.FAILED,
    },
    RunStatus.RUNNING: {
        RunEvent.SUCCEED: RunStatus.SUCCESSFUL,
        RunEvent.FAIL: RunStatus.FAILED,
        RunEvent.CANCEL: RunStatus.CANCELLED,
        RunEvent.RETRY: RunStatus.READY,
        RunEvent.PUT_BACK: RunStatus.READY,
    },
    RunStatus.SUCCESSFUL: {},
    RunStatus.FAILED: {},
    RunStatus.CANCELLED: {},
}


class Ending(enum.StrEnum):
    """How one attempt ended."""

    RETURNED = "returned"
    RAISED = "raised"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"


class ProcessState(enum.StrEnum):
    """State of a child process: supervisord's words plus DRAINING."""

    STARTING = "STARTING"
    RUNNING = "RUNNING"
    #: finishes what it has, takes nothing new
    DRAINING = "DRAINING"
    #: was told to leave (TERM), is killed at its deadline
    STOPPING = "STOPPING"
    #: died; the next start waits
    BACKOFF = "BACKOFF"
    EXITED = "EXITED"
    #: given up on
    FATAL = "FATAL"


class ProcessEvent(enum.Enum):
    """What can happen to a child process."""

    READY = enum.auto()
    DRAIN = enum.auto()
    TERMINATE = enum.auto()
    EXIT = enum.auto()
    WAIT = enum.auto()
    START = enum.auto()
    GIVE_UP = enum.auto()


PROCESS_TRANSITIONS: Final[Mapping[ProcessState, Mapping[ProcessEvent, ProcessState]]] = {
    ProcessState.STARTING: {
        ProcessEvent.READY: ProcessState.RUNNING,
        ProcessEvent.TERMINATE: ProcessState.STOPPING,
        ProcessEvent.EXIT: ProcessState.EXITED,
    },
    ProcessState.RUNNING: {
        ProcessEvent.DRAIN: ProcessState.DRAINING,
        ProcessEvent.TERMINATE: ProcessState.STOPPING,
        ProcessEvent.EXIT: ProcessState.EXITED,
    },
    ProcessState.DRAINING: {
        ProcessEvent.TERMINATE: ProcessState.STOPPING,
        ProcessEvent.EXIT: ProcessState.EXITED,
    },
    ProcessState.STOPPING: {ProcessEvent.EXIT: ProcessState.EXITED},
    ProcessState.BACKOFF: {
        ProcessEvent.START: ProcessState.STARTING,
        ProcessEvent.TERMINATE: ProcessState.EXITED,
    },
    ProcessState.EXITED: {
        ProcessEvent.WAIT: ProcessState.BACKOFF,
        ProcessEvent.START: ProcessState.STARTING,
        ProcessEvent.GIVE_UP: ProcessState.FATAL,
    },
    ProcessState.FATAL: {ProcessEvent.START: ProcessState.STARTING},
}

_State = TypeVar("_State", RunStatus, ProcessState)
_Event = TypeVar("_Event", RunEvent, ProcessEvent)


def _next(table: Mapping[_State, Mapping[_Event, _State]], state: _State, event: _Event) -> _State:
    try:
        return table[state][event]
    except KeyError:
        raise LifecycleError(f"{event.name} is not expected in state {state.value}") from None


def next_run_status(status: RunStatus, event: RunEvent) -> RunStatus:
    """Return the state that `event` leads to from `status`.

    Raises:
      LifecycleError: the table has no such transition.
    """
    return _next(RUN_TRANSITIONS, status, event)


def next_process_state(state: ProcessState, event: ProcessEvent) -> ProcessState:
    """Return the state that `event` leads to from `state`.

    Raises:
      LifecycleError: the table has no such transition.
    """
    return _next(PROCESS_TRANSITIONS, state, event)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt's ending means for its run.

    Attributes:
      event: what happens to the run.
      delay: seconds before the next attempt may start; 0.0 unless the event leads back to READY.
      quarantined: the run has killed too many runners to be tried again.
    """

    event: RunEvent
    delay: float = 0.0
    quarantined: bool = False


#: Seconds before an attempt follows a crash, by number of attempts so far; the last one repeats. A crash has no
#: exception for the user's `backoff` to look at, so the policy is numeric.
CRASH_BACKOFF: Final = (0.5, 2.0, 10.0, 60.0)

#: Runners that one run may kill; then it is quarantined, whatever `max_attempts` still allows. Two can be chance
#: (memory was short, a library's race), a third is the run. Precedent: Sidekiq Pro calls a poison pill what it had
#: to recover three times.
QUARANTINE_AFTER: Final = 3


def verdict(
    ending: Ending,
    *,
    attempts: int,
    max_attempts: int,
    on_lost: str,
    cancelling: bool,
    retry_in: float | None = None,
    lost: int = 0,
    crashes: int = 0,
) -> Verdict:
    """Decide what the ending of attempt number `attempts` (counted from 1) means for the run.

    A run that is being cancelled ends as cancelled unless the attempt returned all the same. `lost` is not the
    task's fault: it goes back uncounted, or fails when `on_lost` is "fail". `retry_in` is what the user's
    `backoff` said in the runner, in seconds; None means that it did not ask for another attempt. `lost` counts how
    often the run was lost unasked, this time included: once may be chance, a run that takes its supervisor along
    must not do so at every start. `crashes` counts the runners that the run has killed, this one included.
    """
    if ending is Ending.RETURNED:
        return Verdict(RunEvent.SUCCEED)
    if cancelling or ending is Ending.CANCELLED:
        return Verdict(RunEvent.CANCEL)
    if ending is Ending.LOST:
        if on_lost != "retry":
            return Verdict(RunEvent.FAIL)
        return Verdict(
            RunEvent.PUT_BACK, 0.0 if lost < 2 else CRASH_BACKOFF[min(lost - 1, len(CRASH_BACKOFF)) - 1]
        )
    if ending is Ending.CRASHED and crashes >= QUARANTINE_AFTER:
        return Verdict(RunEvent.FAIL, quarantined=True)
    if attempts >= max_attempts:
        return Verdict(RunEvent.FAIL)
    if ending is Ending.RAISED:
        return Verdict(RunEvent.FAIL) if retry_in is None else Verdict(RunEvent.RETRY, max(0.0, retry_in))
    return Verdict(RunEvent.RETRY, CRASH_BACKOFF[min(attempts, len(CRASH_BACKOFF)) - 1])
