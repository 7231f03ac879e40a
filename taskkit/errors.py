"""Every error of ours, as one tree: whose fault it is, what the caller should do.

TaskkitError
 x WireError              bytes on a pipe or socket broke the protocol
   + LocalWireError         ours: a bug; raise, never send
   + RemoteWireError        theirs: close the pipe, end the child
     - FrameTooLarge, CorruptFrame, VersionMismatch, UnexpectedMessage
 x LifecycleError         an event came in a state that does not expect it; nothing changed
 x SubmitError            the request cannot become a run; carries `code` and HTTP `status`
   + UnknownTask 404, InvalidArguments 422, Forbidden 403, IdempotencyConflict 409,
     QueueFull 429, NotWritable 503
 x SettingsError          a setting or flag is wrong; names key, value and remedy
 x RunError               what a client raises for a run that did not succeed; carries the snapshot
   + RunFailed, RunCrashed, RunTimedOut, RunWasCancelled, RunLost
 x GatewayError           the gateway answered with a problem, or not at all
 x SupervisorError        ends the daemon, with an exit code
   + NeverReady, RestartIntensityExceeded, AlreadyRunning, AddressInUse
RunCancelled(BaseException)  raised *inside* a task: `except Exception` must not eat it
Class paths recorded for an end that no exception of user code brought about (Django's TaskError):
  TaskTimeout(TimeoutError), CpuTimeout, ScheduleTimeout, RunnerCrashed, RunnerOutOfMemory, RunnerLost, TaskCancelled,
  DependencyFailed
SoftTimeout, StallTimeout (TaskTimeout)  raised inside a task that has to stop, too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final


class TaskkitError(Exception):
    """Base of every error that this package raises on purpose."""


class WireError(TaskkitError):
    """Bytes on a pipe or socket do not follow the protocol."""


class LocalWireError(WireError):
    """This side tried to send something that the protocol forbids: a bug of ours or a value of the caller's."""


class RemoteWireError(WireError):
    """The other side broke the protocol: stop reading it and end it."""


class FrameTooLarge(RemoteWireError):
    """A frame announces more bytes than were agreed on."""


class CorruptFrame(RemoteWireError):
    """Magic, checksum or body of a frame is wrong."""


class VersionMismatch(RemoteWireError):
    """The peer speaks another version of the protocol."""


class UnexpectedMessage(RemoteWireError):
    """A well-formed message came where the protocol does not allow it."""


class LifecycleError(TaskkitError):
    """An event came in a state that does not expect it. Nothing has changed."""


class SubmitError(TaskkitError):
    """A submission cannot become a run; the caller has to change it or wait.

    Attributes:
      code: stable slug, the last part of the problem's `type`.
      status: HTTP status.
      errors: message per field, by the field's name as the caller wrote it.
      retry_after: seconds after which the same request may succeed, or None.
      run: id of the run to retry with, when the outcome is unknown.
    """

    code = "invalid-submission"
    status = 422

    def __init__(
        self,
        detail: str,
        *,
        errors: dict[str, str] | None = None,
        retry_after: float | None = None,
        run: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.errors = errors or {}
        self.retry_after = retry_after
        self.run = run


class UnknownTask(SubmitError):
    """No task of that name is in the catalogue."""

    code, status = "unknown-task", 404


class InvalidArguments(SubmitError):
    """The arguments do not fit the task's signature."""

    code, status = "invalid-arguments", 422


class Forbidden(SubmitError):
    """The token does not allow this."""

    code, status = "forbidden", 403


class IdempotencyConflict(SubmitError):
    """The idempotency key was used with another body."""

    code, status = "idempotency-conflict", 409


class QueueFull(SubmitError):
    """As many runs wait as `LIMITS.queued_runs` allows, or a run was told as much as is kept."""

    code, status = "queue-full", 429


class NotWritable(SubmitError):
    """The store, or for a model task the database, cannot take the run now; the outcome is unknown."""

    code, status = "not-writable", 503


class SettingsError(TaskkitError):
    """A setting, environment variable or flag is wrong. The message names key, value and remedy."""


class RunError(TaskkitError):
    """A run ended otherwise than successfully.

    Attributes:
      snapshot: the run as `GET /api/v1/runs/{id}` shows it.
    """

    def __init__(self, detail: str, snapshot: dict[str, Any]) -> None:
        super().__init__(detail)
        self.snapshot = snapshot


class RunFailed(RunError):
    """User code raised; `snapshot["error"]` has class path, message and traceback text."""


class RunCrashed(RunError):
    """The runner died under the task; `snapshot["error"]["cause"]` has the signal or exit code."""


class RunTimedOut(RunError):
    """The run exceeded its time limit."""


class RunWasCancelled(RunError):
    """Somebody cancelled the run."""


class RunLost(RunError):
    """The machine or the supervisor went away under the run, and its policy forbids another attempt."""


#: What a client raises for a run that did not succeed, by its ending or its error's code.
ENDINGS: Final[Mapping[str, type[RunError]]] = {
    "raised": RunFailed,
    "crashed": RunCrashed,
    "quarantined": RunCrashed,
    "timed_out": RunTimedOut,
    "expired": RunTimedOut,
    "cancelled": RunWasCancelled,
    "lost": RunLost,
}


class GatewayError(TaskkitError):
    """The gateway refused a request or cannot be reached.

    Attributes:
      problem: the RFC 9457 document, or an empty dict when there was no answer.
    """

    def __init__(self, detail: str, problem: dict[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.problem = problem or {}


class SupervisorError(TaskkitError):
    """Ends the supervisor; `exit_code` is what the process leaves with (CONTRACT §5)."""

    exit_code = 4


class NeverReady(SupervisorError):
    """A child the tree cannot do without did not become ready, or the project cannot be imported."""

    exit_code = 2


class AlreadyRunning(SupervisorError):
    """Another supervisor holds the lock of this state directory."""

    exit_code = 3


class AddressInUse(SupervisorError):
    """Somebody else listens on the address."""

    exit_code = 2


class RestartIntensityExceeded(SupervisorError):
    """A child had to be restarted too often; whoever started the supervisor has to decide."""

    exit_code = 4


class RunCancelled(BaseException):
    """Raised inside a synchronous task when its run is cancelled.

    A BaseException, so that `except Exception` does not eat it. Clean up and let it pass; an async task gets
    its event loop's own cancellation instead.
    """


class TaskTimeout(TimeoutError):
    """An attempt exceeded its `timeout` and was ended by the supervisor."""


class SoftTimeout(TaskTimeout):
    """An attempt exceeded its `soft_timeout`; raised inside a synchronous task.

    An Exception, as Celery's SoftTimeLimitExceeded: catch it to return what there is, or let it pass. An async task
    gets its event loop's own cancellation instead.
    """


class StallTimeout(TaskTimeout):
    """An attempt sent no event for its `stall_timeout`; raised inside a synchronous task, as `SoftTimeout`."""


class CpuTimeout(TaskTimeout):
    """An attempt used up its `cpu_timeout` and was ended by the supervisor."""


class ScheduleTimeout(TaskTimeout):
    """The run waited longer than its `schedule_timeout`; it was not started."""


class RunnerCrashed(Exception):
    """The process died under the task; Django's `TaskError` names this class then."""


class RunnerOutOfMemory(RunnerCrashed):
    """The process died for want of memory."""


class RunnerLost(Exception):
    """The machine or the supervisor went away under the task, which allows no other attempt."""


class DependencyFailed(Exception):
    """A run that this one comes after did not succeed, so it was not started; Django's `TaskError` names this class."""


class TaskCancelled(Exception):
    """Somebody cancelled the run; Django's `TaskError` names this class then."""
