"""Writes every signal about a task to the file in SHOP_HEARD, a line of JSON each."""

import json
import os
from typing import Any

from taskkit.signals import run_finished, run_started


def _note(**what: Any) -> None:
    with open(os.environ["SHOP_HEARD"], "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


def connect() -> None:
    """Listen to all that there is."""
    from tests.interface.package import signals

    for name in ("task_enqueued", "task_started", "task_finished"):
        getattr(signals, name).connect(_heard(name), weak=False)
    run_started.connect(_run_started, weak=False)
    run_finished.connect(_run_finished, weak=False)


def _heard(name: str) -> Any:
    def note(sender: type, task_result: Any, **kwargs: Any) -> None:
        errors = [error.exception_class_path for error in task_result.errors]
        _note(
            signal=name,
            sender=sender.__name__,
            id=task_result.id,
            status=str(task_result.status),
            errors=errors,
        )

    return note


def _run_started(sender: Any, run: Any, **kwargs: Any) -> None:
    _note(signal="run_started", sender=sender.__name__, id=run.id, status="RUNNING", errors=[])


def _run_finished(sender: Any, run: Any, status: str, error: Any, **kwargs: Any) -> None:
    errors = [] if error is None else [error["code"]]
    _note(signal="run_finished", sender=sender.__name__, id=run.id, status=status, errors=errors)
