"""The project's `Run` rows, kept in step with what the gateway says.

Rule 1: older news never overwrite newer; `version` decides.

Rule 2: every transaction begins with a write. On SQLite a deferred transaction that reads first fails at once
("database is locked") when somebody wrote in between, instead of waiting its turn.

Rule 3: what comes with another fence than the run's is void: the run is another node's now (taskkit.courier.takeover).

Rule 4: the gateway is right. It has at most one open run per task row, so another open projection of that row
is either a submission that waits in the outbox, or one whose end was lost on the way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final

from django.db import DataError, IntegrityError, transaction
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.utils import timezone

from taskkit.courier import unspoken, upsert
from taskkit.lifecycle import TERMINAL, RunStatus
from taskkit.models import OPEN, ROW_KEY_LENGTH, Outbox, Run
from taskkit.times import moment
from taskkit.wire.messages import Submitted, Transition

_log = logging.getLogger("bulkhead.courier")

#: Errors that are kept of a run's attempts, the newest.
MAX_ERRORS: Final = 20

#: Characters of a refusal that are logged; the projection has all of it.
_LOGGED: Final = 500

#: What a database says of a value that it will not take next time either; RecursionError is JSON's, of a value that is
#: nested too deeply.
_UNSTORABLE: Final = (IntegrityError, DataError, ValueError, OverflowError, RecursionError)


def write(using: str, transitions: Sequence[Transition], node: str = "") -> None:
    """Bring the database `using` up to these transitions of `node`: in one transaction, or one each if that fails.

    A value that this database cannot store (NUL in PostgreSQL's jsonb, NaN) is left out, so that the status
    is right all the same; what fails even then is logged and given up.

    Raises:
      DatabaseError: the database is away; nothing of what was not committed counts.
    """
    try:
        with transaction.atomic(using=using):
            plain = [transition for transition in transitions if upsert.is_plain(using, transition)]
            if plain:
                upsert.write(using, plain, node)
            for transition in transitions:
                if not upsert.is_plain(using, transition):
                    _put(using, transition, {**_values(transition), "node": node})
    except _UNSTORABLE:
        for transition in transitions:
            _write_alone(using, transition, node)


def _write_alone(using: str, transition: Transition, node: str) -> None:
    for columns in (_values, _bare_values):
        try:
            with transaction.atomic(using=using):
                _put(using, transition, {**columns(transition), "node": node})
            return
        except _UNSTORABLE as error:
            _log.warning(
                "run %s, %s: %r does not take it: %s", transition.run, columns.__name__, using, error
            )
    _log.error(
        "run %s: its projection stays as it is in %r: nothing of version %d can be stored",
        transition.run,
        using,
        transition.version,
    )


def _values(transition: Transition) -> dict[str, Any]:
    """Return the columns of the projection."""
    return {
        **_bare_values(transition),
        "args": json.loads(transition.args),
        "kwargs": json.loads(transition.kwargs),
        **({"worker_ids": [transition.runner]} if transition.attempt == 1 else {}),
        "result": None if transition.result is None else json.loads(transition.result),
        "error": None if transition.error is None else json.loads(transition.error),
        "metadata": json.loads(transition.metadata),
        "tags": transition.tags,
    }


def _bare_values(transition: Transition) -> dict[str, Any]:
    """Return the columns that any database can store."""
    key = transition.row.key if transition.row else None
    return {
        "task": transition.task,
        "fence": transition.fence,
        "status": RunStatus(transition.status).value,
        "version": transition.version,
        "attempt": transition.attempt,
        "priority": transition.priority,
        "attempted_at": None if transition.attempted_at is None else moment(transition.attempted_at),
        "row_key": key if key is None or len(key) <= ROW_KEY_LENGTH else None,
        "created_at": moment(transition.created_at),
        "started_at": None if transition.started_at is None else moment(transition.started_at),
        "finished_at": None if transition.finished_at is None else moment(transition.finished_at),
    }


def _put(using: str, transition: Transition, values: dict[str, Any]) -> None:
    run = transition.run
    if values["row_key"] and values["status"] not in TERMINAL:
        _make_way(using, run, values)
    runs = Run.objects.using(using).filter(id=run)
    # A write first (rule 2), whose conditions decide (rules 1, 3).
    if runs.filter(version__lt=transition.version, fence__in=("", transition.fence)).update(**values):
        if transition.attempt > 1 or transition.failure is not None:
            _add_attempt(runs, transition)
        if unspoken.is_unspoken(transition):
            unspoken.submit(using, transition.run)
    elif not runs.exists():
        # What Django did not submit and cannot store it could not submit elsewhere.
        options = json.loads(transition.options) if "args" in values else None
        created = Run(id=run, **values, options=options)
        Run.objects.using(using).bulk_create([created])  # unlike create: no signal, no user code
        _add_attempt(runs, transition)
        if unspoken.is_unspoken(transition):
            unspoken.submit(using, transition.run)


def _add_attempt(runs: QuerySet[Run], transition: Transition) -> None:
    """Put the newest attempt behind those that are known; of several that were told of at once only that is."""
    for run in runs:
        workers = [*run.worker_ids, *[""] * transition.attempt][: max(transition.attempt - 1, 0)]
        errors = [error for error in run.errors if error.get("attempt") != transition.attempt]
        if transition.failure is not None:
            errors.append({**json.loads(transition.failure), "attempt": transition.attempt})
        workers += [transition.runner] if transition.attempt else []
        runs.update(worker_ids=workers, errors=errors[-MAX_ERRORS:])


def _make_way(using: str, run: str, values: dict[str, Any]) -> None:
    """Let no other open projection hold the row's key: the constraint allows one.

    A waiting submission keeps its row without the key; the gateway answers it with this run, or makes it a
    run of its own, whose transition brings the key back. What another node has keeps the key, and this run is without.
    Anything else has ended unheard; a late transition of it still counts, as the version stays.
    """
    row_key = values["row_key"]
    others = Run.objects.using(using).filter(row_key=row_key, status__in=OPEN).exclude(id=run)
    if others.exclude(node__in=("", values["node"])).exists():
        values["row_key"] = None
        return
    waiting = Outbox.objects.using(using).filter(row_key=row_key, state=Outbox.State.PENDING).values("id")
    others.filter(id__in=waiting).update(row_key=None)
    error = {"code": "superseded", "message": f"how it ended was not heard; its row now has the run {run}"}
    others.update(status=RunStatus.FAILED.value, error=error, finished_at=timezone.now())


def settle(using: str, answers: Iterable[Submitted]) -> None:
    """Act on the gateway's answers to submissions from the database `using`, in one transaction.

    Accepted: the outbox entry goes. Its row was running already: the entry and its projection go, the other
    run has one of its own. Refused: the entry stays for people to see, the projection says why it failed.
    An answer of a node that has the run no more is void.

    Raises:
      DatabaseError: the database is away; the answers still stand.
    """
    refused = []
    accepted: dict[str, list[str]] = {}
    with transaction.atomic(using=using):
        for answer in answers:
            if not (answer.code or answer.error):
                accepted.setdefault(answer.fence, []).append(answer.id)
                if answer.run != answer.id:
                    gone = Run.objects.using(using).filter(id=answer.id, version=0)
                    gone.filter(fence__in=("", answer.fence))._raw_delete(using)
                continue
            # PostgreSQL stores no NUL, and an answer that cannot be stored would be tried for ever
            code, message = answer.code or "refused", answer.error.replace("\0", "\ufffd")
            refused.append((answer.id, _refuse(using, answer, code, message), code, message))
        for fence, ids in accepted.items():
            # Unlike delete(): one statement, no signal, no user code. Nothing refers to these rows.
            _entries(using, ids, fence)._raw_delete(using)
    for run, task, code, message in refused:
        _log.warning("run %s of %s in %r was refused (%s): %s", run, task, using, code, _one_line(message))


def _entries(using: str, ids: list[str], fence: str) -> QuerySet[Outbox]:
    """Return the outbox entries of runs that no other node has by now: a run that was put back has a new entry."""
    others = Run.objects.using(using).filter(id=OuterRef("id")).exclude(fence__in=("", fence))
    return Outbox.objects.using(using).filter(~Exists(others), id__in=ids)


def _refuse(using: str, answer: Submitted, code: str, message: str) -> str:
    """Store the refusal; return the name of the task."""
    run = answer.id
    _entries(using, [run], answer.fence).update(state=Outbox.State.REFUSED, error=message or code)
    # Of one that was taken over, Django had heard before.
    new = Run.objects.using(using).filter(Q(version=0) | Q(moves__gt=0), id=run, fence__in=("", answer.fence))
    new.filter(status__in=OPEN).update(
        status=RunStatus.FAILED.value, error={"code": code, "message": message}, finished_at=timezone.now()
    )
    found = Run.objects.using(using).filter(id=run).values_list("task", flat=True)[:1]
    task = next(iter(found), "a task that is not known")
    if unspoken.has_listeners(task):
        unspoken.submit(using, run)
    return task


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LOGGED]
