"""How an attempt's end is named, in the store as on the stream. Pure."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import msgspec

from gateway.store.rows import RunRow
from taskkit.lifecycle import Ending
from taskkit.wire.messages import Cause, TaskFailure

#: Largest result repeated in `stream.end`; a larger one is fetched from the run's `result`.
_RESULT_IN_STREAM: Final = 64 * 1024

#: How a runner's death ends the attempt that was open on it; what is not listed is the task's own crash.
_BY_CAUSE: Final = {
    "timeout": Ending.TIMED_OUT,
    "cancelled": Ending.CANCELLED,
    "stopped": Ending.LOST,
    "operator": Ending.LOST,
    "boot": Ending.LOST,
    "lost": Ending.LOST,
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


def last_event(run: RunRow, error: dict[str, Any] | None) -> dict[str, Any]:
    """Return the data of a run's `stream.end`, by its status; a large result is fetched from the run instead."""
    body: dict[str, Any] = {"status": run.status.value}
    if error is not None:
        body["error"] = error
    elif run.result is not None and len(run.result) <= _RESULT_IN_STREAM:
        body["result"] = msgspec.Raw(run.result)
    return body


def rfc3339(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat().replace("+00:00", "Z")


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
