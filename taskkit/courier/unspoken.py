"""Ends of runs that no runner could tell of: somebody else has to send their signals.

The courier runs no user code, and receivers are user code, so it submits a run that calls them.
"""

from __future__ import annotations

import json
from functools import cache

from taskkit import registry
from taskkit.identifiers import new_run_id
from taskkit.lifecycle import RunStatus
from taskkit.outbox import insert_rows
from taskkit.signals import ANNOUNCE, run_finished
from taskkit.wire.messages import Submit, Transition


def is_unspoken(transition: Transition) -> bool:
    """Whether the run is over, somebody listens, and its own process cannot have told."""
    status = RunStatus(transition.status)
    if not status.is_terminal or status is RunStatus.SUCCESSFUL:
        return False
    return not _raised(transition) and has_listeners(transition.task)


def _raised(transition: Transition) -> bool:
    """Whether it ended by an exception of its own, which the runner has told of."""
    if transition.status != RunStatus.FAILED or transition.failure is None:
        return False
    return bool(json.loads(transition.failure).get("code") == "raised")


@cache
def has_listeners(task: str) -> bool:
    """Whether somebody wants to hear of the end of every run of this task."""
    if task == ANNOUNCE:  # or one that is refused would be told of by another, for ever
        return False
    definition = registry.known().get(task)
    return definition is not None and (definition.interface is not None or bool(run_finished.receivers))


def submit(using: str, run: str) -> None:
    """Have the end of this run told of, if the transaction that is open commits."""
    insert_rows(Submit(id=new_run_id(), task=ANNOUNCE, kwargs={"run": run, "using": using}, using=using))
