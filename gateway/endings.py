"""How an attempt's end is named, in the store as on the stream. Pure."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import msgspec

from gateway.store.rows import RunRow
from taskkit.lifecycle import Ending
from taskkit.wire.messages import Cause, Taken, TaskFailure

#: Largest result repeated in `stream.end`; a larger one is fetched from the run's `result`.
_RESULT_IN_STREAM: Final = 64 * 1024

#: Error code of a run that has killed too many runners.
QUARANTINED: Final = "quarantined"

#: Error code of a run that has waited too long to be started.
EXPIRED: Final = "expired"

#: How a runner's death ends the attempt that was open on it; what is not listed is the task's own crash.
_BY_CAUSE: Final = {
    "timeout": Ending.TIMED_OUT,
    "soft_timeout": Ending.TIMED_OUT,
    "cpu_timeout": Ending.TIMED_OUT,
    "stall_timeout": Ending.TIMED_OUT,
    "cancelled": Ending.CANCELLED,
    "stopped": Ending.LOST,
    "operator": Ending.LOST,
    "boot": Ending.LOST,
    "lost": Ending.LOST,
    "abandoned": Ending.LOST,
}


def ending_of(cause: Cause) -> Ending:
    """Return how the death of its runner ends an attempt."""
    return _BY_CAUSE.get(cause.kind, Ending.CRASHED)


def of_user_code(cause: Cause) -> Cause:
    """Return the cause of death of a runner that had begun an attempt.

    A runner that cannot start leaves with an exit code of its own. Once user code runs, that code is user code's:
    taken for a failed start it would be tried again for ever, uncounted.
    """
    if cause.kind in ("boot", "lost") and cause.exit_code is not None:
        detail = f"the process left with exit code {cause.exit_code} in the middle of the task"
        return msgspec.structs.replace(cause, kind="exit", detail=detail)
    return cause


def among_others(cause: Cause, runs: int) -> Cause:
    """Return the cause of death of a process that performed `runs` runs: whose fault it was is not known yet."""
    detail = f"{cause.detail}; {runs} runs shared the process, so each of them is performed again alone"
    return msgspec.structs.replace(cause, detail=detail)


def with_limit(failure: TaskFailure | None, memory_limit: int | None) -> TaskFailure | None:
    """Return a failure for want of memory with the limit that was met, which Python's own message lacks."""
    # Also numpy's _ArrayMemoryError, pyarrow's ArrowMemoryError.
    if failure is None or memory_limit is None or not failure.exception.endswith("MemoryError"):
        return failure
    limit = f"the limit is {memory_limit} bytes of address space (memory_limit, RLIMIT_AS)"
    return msgspec.structs.replace(
        failure, message=f"{failure.message}; {limit}" if failure.message else limit
    )


def quarantine_of(error: dict[str, Any], run: RunRow) -> dict[str, Any]:
    """Return the error of a run that has killed too many runners, from that of its last attempt."""
    return {
        **error,
        "code": QUARANTINED,
        "message": f"quarantined: it has killed {run.crashes} runners, the last time: {error['message']}. When the "
        f"cause is mended, `bulkhead release {run.id}` performs it again as a new run",
        "crashes": run.crashes,
    }


def last_event(run: RunRow, error: dict[str, Any] | None) -> dict[str, Any]:
    """Return the data of a run's `stream.end`, by its status; a large result is fetched from the run instead."""
    body: dict[str, Any] = {"status": run.status.value}
    if error is not None:
        body["error"] = error
    elif run.result is not None and len(run.result) <= _RESULT_IN_STREAM:
        body["result"] = msgspec.Raw(run.result)
    return body


def lost_with(taken: Taken) -> dict[str, Any]:
    """Return the error of an attempt whose node is dead."""
    message = f"the node {taken.node} died or was cut off; another one has the run now"
    if not taken.began:
        message += ". Whether it had begun is not known"
    return {"code": Ending.LOST.value, "message": message}


def rfc3339(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat().replace("+00:00", "Z")


def expired(run: RunRow) -> dict[str, Any]:
    """Return the error of a run that was not started in time."""
    message = f"the run was not started within its schedule_timeout of {run.schedule_timeout:g} s"
    return {"code": EXPIRED, "message": message}


def error_of(ending: Ending, cause: Cause | None, failure: TaskFailure | None) -> dict[str, Any]:
    """Return the public form of an attempt's bad end: `{code, message, exception?, traceback?, cause?}`."""
    error: dict[str, Any] = {"code": ending.value, "message": ""}
    if failure is not None:
        error |= {"message": failure.message, "exception": failure.exception, "traceback": failure.traceback}
    if cause is not None:
        error["cause"] = msgspec.to_builtins(cause)
        error["message"] = error["message"] or cause.detail
    error["message"] = error["message"] or error.get("exception", ending.value)
    return error
