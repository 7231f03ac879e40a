"""Runs as Django's own Tasks interface shows them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any, Final

from django.core.exceptions import ValidationError

from taskkit import registry
from taskkit.errors import UnknownTask
from taskkit.identifiers import run_id_time
from taskkit.interface import (
    InvalidTask,
    Task,
    TaskError,
    TaskResult,
    TaskResultDoesNotExist,
    TaskResultStatus,
)
from taskkit.lifecycle import RunStatus
from taskkit.models import Run
from taskkit.outbox import RunHandle, as_json
from taskkit.times import moment

#: Their four words for our five: who did not succeed has failed (reference: the DEP's "should compress").
_STATUS: Final = {
    RunStatus.READY: TaskResultStatus.READY,
    RunStatus.RUNNING: TaskResultStatus.RUNNING,
    RunStatus.SUCCESSFUL: TaskResultStatus.SUCCESSFUL,
    RunStatus.FAILED: TaskResultStatus.FAILED,
    RunStatus.CANCELLED: TaskResultStatus.FAILED,
}

#: The exception that stands for an end which no exception of user code brought about, by the error's code.
_EXCEPTIONS: Final = {
    "crashed": "taskkit.errors.RunnerCrashed",
    "quarantined": "taskkit.errors.RunnerCrashed",
    "timed_out": "taskkit.errors.TaskTimeout",
    "expired": "taskkit.errors.ScheduleTimeout",
    "cancelled": "taskkit.errors.TaskCancelled",
    "lost": "taskkit.errors.RunnerLost",
    "dependency_failed": "taskkit.errors.DependencyFailed",
}

#: The exception that stands for a cause, if there is a better one than for its code.
_BY_CAUSE: Final = {
    "oom": "taskkit.errors.RunnerOutOfMemory",
    "oom_suspected": "taskkit.errors.RunnerOutOfMemory",
    "soft_timeout": "taskkit.errors.SoftTimeout",
    "cpu_timeout": "taskkit.errors.CpuTimeout",
    "stall_timeout": "taskkit.errors.StallTimeout",
}


def of_submission(
    task: Task[..., Any], handle: RunHandle, args: Any, kwargs: Mapping[str, Any]
) -> TaskResult[Any]:
    """Return the result of what was submitted just now."""
    run = Run(
        id=handle.id,
        status=RunStatus.READY.value,
        args=as_json(list(args), "args"),
        kwargs=as_json(dict(kwargs), "kwargs"),
    )
    return _result(run, task)


def find(id: str, using: str, backend: str) -> TaskResult[Any]:
    """Return the result of a run by its id.

    Raises:
      TaskResultDoesNotExist: see `BulkheadBackend.get_result`.
    """
    try:
        run = Run.objects.using(using).get(id=uuid.UUID(str(id)))
    except (Run.DoesNotExist, ValidationError, ValueError):
        raise TaskResultDoesNotExist(id) from None
    if run.backend not in ("", backend):
        raise TaskResultDoesNotExist(id)
    return _result(run, _task_of(run))


def _task_of(run: Run) -> Task[..., Any]:
    """Return the Task as the submission had changed it, or as it is defined when its queue is gone since.

    Raises:
      TaskResultDoesNotExist: there is none.
    """
    try:
        task = registry.find(run.task).interface
    except UnknownTask as error:
        raise TaskResultDoesNotExist(str(error)) from error
    if task is None:
        raise TaskResultDoesNotExist(f"{run.task} is no Task of Django's interface; run {run.id} is a Run")
    changes: dict[str, Any] = {"priority": run.priority, "run_after": run.run_after}
    if run.queue:
        changes["queue_name"] = run.queue
    if run.backend:
        changes["backend"] = run.backend
    if "metadata" in {field.name for field in dataclasses.fields(task)}:
        changes["metadata"] = run.metadata
    try:
        return dataclasses.replace(task, **changes)
    except InvalidTask:  # validated against today's settings
        return task  # type: ignore[no-any-return]


def _result(run: Run, task: Task[..., Any]) -> TaskResult[Any]:
    result: TaskResult[Any] = TaskResult(
        task=task,
        id=str(run.id),
        status=_STATUS[RunStatus(run.status)],
        enqueued_at=moment(run_id_time(str(run.id))),
        started_at=run.started_at,
        finished_at=run.finished_at,
        last_attempted_at=run.attempted_at,
        args=run.args,
        kwargs=run.kwargs,
        backend=task.backend,
        errors=[error_of(error) for error in _errors(run)],
        worker_ids=list(run.worker_ids),
    )
    object.__setattr__(result, "_return_value", run.result)
    return result


def _errors(run: Run) -> list[Mapping[str, Any]]:
    """Return the bad ends of its attempts, or that of a run which ended without one."""
    return run.errors or ([run.error] if run.error else [])


def error_of(error: Mapping[str, Any]) -> TaskError:
    """Return an attempt's bad end, `{code, message, exception?, traceback?, cause?}`, as theirs."""
    path = error.get("exception") or _EXCEPTIONS.get(error.get("code", ""), "taskkit.errors.TaskkitError")
    if error.get("code") not in ("cancelled", "lost"):
        path = _BY_CAUSE.get((error.get("cause") or {}).get("kind", ""), path)
    said = error.get("traceback") or f"{path}: {error.get('message', '')}\n"
    return TaskError(exception_class_path=path, traceback=said)
