"""Django's own Tasks interface: Django's where it has one, else its backport.

Raises:
  ImproperlyConfigured: neither is installed; the message has the remedy.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from django_tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.exceptions import InvalidTaskError as InvalidTask
    from django_tasks.exceptions import TaskResultDoesNotExist
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

    PACKAGE: str
else:
    from django.core.exceptions import ImproperlyConfigured

    #: The package that users import `task` from.
    PACKAGE: Final = next(
        (name for name in ("django.tasks", "django_tasks") if importlib.util.find_spec(name)), None
    )
    if PACKAGE is None:
        raise ImproperlyConfigured(
            "taskkit.backend needs Django's Tasks interface: Django 6, or for Django 5.2 its backport: "
            "pip install 'django-bulkhead[tasks]'"
        )
    _top = importlib.import_module(PACKAGE)
    _base = importlib.import_module(f"{PACKAGE}.base")
    _exceptions = importlib.import_module(f"{PACKAGE}.exceptions")
    _signals = importlib.import_module(f"{PACKAGE}.signals")
    task_backends = _top.task_backends
    BaseTaskBackend = importlib.import_module(f"{PACKAGE}.backends.base").BaseTaskBackend
    Task, TaskError = _base.Task, _base.TaskError
    TaskContext, TaskResult, TaskResultStatus = _base.TaskContext, _base.TaskResult, _base.TaskResultStatus
    # The backport's name has another ending.
    InvalidTask = getattr(_exceptions, "InvalidTask", None) or _exceptions.InvalidTaskError
    TaskResultDoesNotExist = _exceptions.TaskResultDoesNotExist
    task_enqueued, task_started, task_finished = (
        _signals.task_enqueued,
        _signals.task_started,
        _signals.task_finished,
    )
    _json = "django.utils.json" if PACKAGE == "django.tasks" else f"{PACKAGE}.utils"
    normalize_json = importlib.import_module(_json).normalize_json

__all__ = [
    "PACKAGE",
    "BaseTaskBackend",
    "InvalidTask",
    "Task",
    "TaskContext",
    "TaskError",
    "TaskResult",
    "TaskResultDoesNotExist",
    "TaskResultStatus",
    "normalize_json",
    "task_backends",
    "task_enqueued",
    "task_finished",
    "task_started",
]
