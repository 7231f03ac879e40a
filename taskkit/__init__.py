"""What users import: tasks, what tasks say, how they are submitted.

Lazy (PEP 562): importing `taskkit` imports nothing else, so that supervisor or gateway can use its pure
rooms without Django. `coordinator` is the module of that name in either import order; the module offers the
methods of the object in it, so `from taskkit import coordinator` works like `from taskkit.coordinator
import coordinator`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers
    from taskkit import coordinator as coordinator
    from taskkit.client import get_client as get_client
    from taskkit.current import current_run as current_run
    from taskkit.current import emit as emit
    from taskkit.current import progress as progress
    from taskkit.errors import RunCancelled as RunCancelled
    from taskkit.errors import RunCrashed as RunCrashed
    from taskkit.errors import RunError as RunError
    from taskkit.errors import RunFailed as RunFailed
    from taskkit.errors import RunLost as RunLost
    from taskkit.errors import RunTimedOut as RunTimedOut
    from taskkit.errors import RunWasCancelled as RunWasCancelled
    from taskkit.errors import TaskTimeout as TaskTimeout
    from taskkit.flows import chain as chain
    from taskkit.flows import group as group
    from taskkit.flows import step as step
    from taskkit.outbox import submit as submit
    from taskkit.scheduling import schedule as schedule
    from taskkit.stream_task import StreamTask as StreamTask
    from taskkit.tasks import task as task

    __version__: str

_HOMES = {
    "RunCancelled": "taskkit.errors",
    "RunCrashed": "taskkit.errors",
    "RunError": "taskkit.errors",
    "RunFailed": "taskkit.errors",
    "RunLost": "taskkit.errors",
    "RunTimedOut": "taskkit.errors",
    "RunWasCancelled": "taskkit.errors",
    "StreamTask": "taskkit.stream_task",
    "TaskTimeout": "taskkit.errors",
    "chain": "taskkit.flows",
    "current_run": "taskkit.current",
    "emit": "taskkit.current",
    "get_client": "taskkit.client",
    "group": "taskkit.flows",
    "progress": "taskkit.current",
    "schedule": "taskkit.scheduling",
    "step": "taskkit.flows",
    "submit": "taskkit.outbox",
    "task": "taskkit.tasks",
}

__all__ = [
    "RunCancelled",
    "RunCrashed",
    "RunError",
    "RunFailed",
    "RunLost",
    "RunTimedOut",
    "RunWasCancelled",
    "StreamTask",
    "TaskTimeout",
    "__version__",
    "chain",
    "coordinator",
    "current_run",
    "emit",
    "get_client",
    "group",
    "progress",
    "schedule",
    "step",
    "submit",
    "task",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "coordinator":
        return importlib.import_module("taskkit.coordinator")
    if name == "__version__":
        return importlib.metadata.version("django-bulkhead")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
