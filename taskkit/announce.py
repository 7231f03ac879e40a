"""The task that tells of a run's end when its own runner could not: it crashed, ran out of time, was cancelled.

The courier submits it, in the transaction that writes the end (taskkit.courier.unspoken).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from taskkit import registry
from taskkit.errors import UnknownTask
from taskkit.models import Run
from taskkit.signals import ANNOUNCE, run_finished
from taskkit.tasks import task


@dataclass(frozen=True, slots=True)
class EndedRun:
    """What receivers of `run_finished` may know of a run that is over."""

    id: str
    task: str
    attempt: int
    metadata: dict[str, Any] = field(default_factory=dict)


@task(name=ANNOUNCE, max_attempts=3)
def announce(run: str, using: str) -> None:
    """Send the signals that a run has ended; its own process could not."""
    ended = Run.objects.using(using).filter(id=run).first()
    if ended is None:  # retention was faster
        return
    try:
        definition = registry.find(ended.task)
    except UnknownTask:
        return
    about = EndedRun(str(ended.id), ended.task, ended.attempt, ended.metadata)
    run_finished.send_robust(
        sender=definition.func or definition.model, run=about, status=ended.status, error=ended.error
    )
    if definition.interface is not None:
        from taskkit import results
        from taskkit.interface import task_finished

        result = results.find(run, using, ended.backend)
        task_finished.send_robust(sender=type(result.task.get_backend()), task_result=result)
