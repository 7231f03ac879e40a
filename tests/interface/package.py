"""Django's Tasks wherever they come from: a project of one Django version would just write the import."""

import importlib
import importlib.util

PACKAGE = "django.tasks" if importlib.util.find_spec("django.tasks") else "django_tasks"

_package = importlib.import_module(PACKAGE)
signals = importlib.import_module(f"{PACKAGE}.signals")
task = _package.task
task_backends = _package.task_backends
TaskResultStatus = _package.TaskResultStatus
