"""Django's Tasks wherever they come from: a project of one Django version would just write the import."""

import importlib
import importlib.util
from types import SimpleNamespace

PACKAGE = "django.tasks" if importlib.util.find_spec("django.tasks") else "django_tasks"

_package = importlib.import_module(PACKAGE)
signals = importlib.import_module(f"{PACKAGE}.signals")
_raised = importlib.import_module(f"{PACKAGE}.exceptions")
#: By the names of Django 6; the backport's have another ending.
exceptions = SimpleNamespace(
    InvalidTask=getattr(_raised, "InvalidTask", None) or _raised.InvalidTaskError,
    InvalidTaskBackend=getattr(_raised, "InvalidTaskBackend", None) or _raised.InvalidTaskBackendError,
    TaskResultDoesNotExist=_raised.TaskResultDoesNotExist,
    TaskResultMismatch=_raised.TaskResultMismatch,
)
task = _package.task
task_backends = _package.task_backends
TaskResultStatus = _package.TaskResultStatus
