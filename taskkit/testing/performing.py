"""Performs tasks in the process of a test, with the events that a stream would have."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import anyio
import msgspec
from asgiref.sync import async_to_sync
from django.db import DEFAULT_DB_ALIAS

from taskkit import current, outbox, registry
from taskkit.conf import get_settings
from taskkit.courier import outbox_reader, projection
from taskkit.errors import RunCancelled
from taskkit.identifiers import new_run_id, new_token
from taskkit.inbox import Inbox
from taskkit.lifecycle import Ending, RunStatus
from taskkit.models import Run
from taskkit.outcomes import ENDED
from taskkit.registry import TaskDefinition
from taskkit.rows import row_address
from taskkit.runner.attempt import Attempt, conclude, finish
from taskkit.runner.inbox import Mail
from taskkit.stream_task import StreamTask
from taskkit.wire.messages import Finished, Progress, RunnerSpec, Start, Submit, Submitted, Transition

#: Submissions that are looked at, to find one that can begin.
_MOST: Final = 1_000

#: Name of the runner that stands for the test's process.
RUNNER: Final = "test"


@dataclass(frozen=True, slots=True)
class Event:
    """What the task said: `offset` counts from 1, `data` is the event's JSON with `_run` and `_attempt`."""

    offset: int
    type: str
    data: dict[str, Any]


@dataclass(slots=True)
class PerformedRun:
    """A run that was performed here.

    Attributes:
      status: "SUCCESSFUL", "FAILED" or "CANCELLED".
      attempts: how many were made; the waits between them were left out.
      events: what the task said, in its order; without those of the run's life (`run.started`, `stream.end`).
      result: what it returned, as JSON has it; None unless it succeeded.
      error: `{code, message, exception, traceback}` of the last attempt; None if it succeeded.
      exception: what the last attempt raised, itself.
    """

    id: str
    task: str
    status: str = RunStatus.RUNNING.value
    attempts: int = 0
    events: list[Event] = field(default_factory=list)
    result: Any = None
    error: dict[str, Any] | None = None
    exception: BaseException | None = None

    def of(self, type: str) -> list[Event]:
        """Return the events of one type."""
        return [event for event in self.events if event.type == type]

    def check(self) -> PerformedRun:
        """Return this run if it succeeded; raise what it raised if not."""
        if self.exception is not None:
            raise self.exception
        assert self.status == RunStatus.SUCCESSFUL, f"{self.task} ended {self.status}: {self.error}"
        return self


def perform(task: str | Callable[..., Any] | StreamTask, /, *args: Any, **kwargs: Any) -> PerformedRun:
    """Perform a task here and now: a function, its name, a Task of Django's interface, or a saved row.

    Nothing is submitted; no run is in the database. What the task raises is in the result, not raised.

    Raises:
      UnknownTask, InvalidArguments, TypeError: as `taskkit.submit`.
    """
    row = task if isinstance(task, StreamTask) else None
    name = outbox.name_of(task, row)
    definition = registry.find(name)
    address = None if row is None else row_address(type(row), row.pk, row._state.db or DEFAULT_DB_ALIAS)
    plain_args = outbox.as_json(list(args), f"args of {name}")
    plain_kwargs = outbox.as_json(dict(kwargs), f"kwargs of {name}")
    definition.bind(plain_args, plain_kwargs)
    submission = Submit(
        id=new_run_id(), task=definition.info.name, args=plain_args, kwargs=plain_kwargs, row=address
    )
    return _perform(submission, definition)


def perform_submitted(using: str | None = None) -> list[PerformedRun]:
    """Perform everything that was submitted on this database, also in the transaction that is open; oldest first.

    Without `using` it is the one that submissions go to.

    What the tasks submit in turn is performed too: a child when its parent waits for it, else afterwards; a run that
    comes after others when they have ended. `run_after` is not waited for. The `Run` rows are afterwards what they
    would be with a tree.
    """
    done: list[PerformedRun] = []
    using = using or outbox.alias_of(None)
    performing = _performing.set(done)
    try:
        while pending := _pending(using):
            ids = {submission.id for submission in pending}
            # A run comes before those after it, and each of these names only older ones: there is one that can begin.
            _perform_entry(next(one for one in pending if ids.isdisjoint(one.after)), using)
    finally:
        _performing.reset(performing)
    return done


def _pending(using: str) -> list[Submit]:
    submissions, refusals = outbox_reader.read(using, (), _MOST)
    projection.settle(using, refusals)
    return submissions


def _perform_entry(submission: Submit, using: str) -> dict[str, Any]:
    """Perform what was submitted; return what others hear of its end."""
    definition = registry.find(submission.task)
    projection.settle(using, [Submitted(id=submission.id, run=submission.id)])
    runs = Run.objects.using(using).in_bulk([uuid.UUID(id) for id in submission.after])
    before = [_outcome(runs[uuid.UUID(id)]) for id in submission.after]
    failed = next((told for told in before if told["status"] != RunStatus.SUCCESSFUL.value), None)
    if failed is None:
        performed = _perform(submission, definition, json.dumps(before).encode())
    else:
        cancelled = failed["status"] == RunStatus.CANCELLED.value
        performed = PerformedRun(
            id=submission.id,
            task=submission.task,
            status=(RunStatus.CANCELLED if cancelled else RunStatus.FAILED).value,
            error={
                "code": "dependency_failed",
                "message": f"it comes after {failed['run']}",
                "run": failed["run"],
            },
        )
    projection.write(using, [_transition(submission, performed)])
    _performing.get([]).append(performed)
    return _outcome(Run.objects.using(using).get(id=submission.id))


def _outcome(run: Run) -> dict[str, Any]:
    told: dict[str, Any] = {"run": str(run.id), "task": run.task, "status": run.status}
    return told | ({"error": run.error} if run.error else {"result": run.result})


@contextmanager
def inputs(**told: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Have every task that is performed in the block hear this: messages by the name of their inbox.

    Once it has taken them all it hears nothing more: waiting for another one is a TimeoutError at once.
    """
    before = _told.set({name: [dict(message) for message in messages] for name, messages in told.items()})
    try:
        yield
    finally:
        _told.reset(before)


_told: ContextVar[Mapping[str, list[dict[str, Any]]]] = ContextVar("bulkhead_told")

#: What was performed by the present `perform_submitted`, children included.
_performing: ContextVar[list[PerformedRun]] = ContextVar("bulkhead_performing")


class _Script(Mail):
    """What `inputs` says. A child is performed when its end is asked for."""

    beside = False

    def __init__(self, using: str) -> None:
        super().__init__()
        self._using = using

    def inbox(self, name: str) -> Inbox:
        if name not in self._inboxes:
            self._inboxes[name] = _ScriptedInbox()
            for message in _told.get({}).get(name, ()):
                self._inboxes[name].put(message)
            for child in _pending(self._using) if name.startswith(ENDED) else ():
                if child.id == name.removeprefix(ENDED):
                    self._inboxes[name].put(_perform_entry(child, self._using))
        return self._inboxes[name]


class _ScriptedInbox(Inbox):
    def get(self, timeout: float | None = None) -> dict[str, Any]:
        return super().get(0)

    async def aget(self, timeout: float | None = None) -> dict[str, Any]:
        return await super().aget(0)


class _Events:
    """Where a task's words go instead of a pipe."""

    def __init__(self, performed: PerformedRun) -> None:
        self._events = performed.events

    def event(self, token: str, type: str, data: bytes) -> None:
        self._events.append(Event(len(self._events) + 1, type, json.loads(data)))

    def send_progress(self, progress: Progress) -> None:
        self.event(progress.token, "run.progress", progress.data)


def _perform(submission: Submit, definition: TaskDefinition, after: bytes = b"[]") -> PerformedRun:
    """Make attempts until one is the last."""
    performed = PerformedRun(id=submission.id, task=definition.info.name)
    while True:
        performed.attempts += 1
        finished = _attempt(submission, definition, performed, after)
        if finished.retry_in is None:
            break
    if finished.ending == Ending.RETURNED:
        performed.status, performed.exception = RunStatus.SUCCESSFUL.value, None
        performed.result = msgspec.json.decode(finished.result or b"null")
    elif finished.failure is None:
        performed.status = RunStatus.CANCELLED.value
        performed.error = {"code": "cancelled", "message": "cancelled"}
    else:
        performed.status = RunStatus.FAILED.value
        performed.error = {"code": "raised", **msgspec.to_builtins(finished.failure)}
    return performed


def _attempt(
    submission: Submit, definition: TaskDefinition, performed: PerformedRun, after: bytes
) -> Finished:
    limits = get_settings().limits
    info = definition.info
    start = Start(
        run=submission.id,
        attempt=performed.attempts,
        token=new_token(),
        task=info.name,
        args=json.dumps(submission.args).encode(),
        kwargs=json.dumps(submission.kwargs).encode(),
        row=submission.row,
        max_attempts=submission.max_attempts or info.max_attempts,
        metadata=json.dumps({**info.metadata, **submission.metadata}).encode(),
        after=after,
    )
    spec = RunnerSpec(id=RUNNER, event_limit=limits.event_bytes, result_limit=limits.result_bytes)
    attempt = Attempt(start, definition, _Events(performed), spec, _Script(submission.using))
    performed.exception = None
    speaker = current.speaker.set(attempt)
    try:
        call = attempt.prepare()
        attempt.audience.begun()
        result = _call(attempt, call)
        attempt.complete(result)
    except RunCancelled as error:
        performed.exception = error
        return attempt.gave_in()
    except (Exception, SystemExit) as error:  # what else there is ends the test itself: Ctrl-C, pytest.fail()
        performed.exception = error
        finished = conclude(attempt, error)
        attempt.audience.ended(finished, error)
        return finished
    finally:
        current.speaker.reset(speaker)
    finished = finish(attempt, result)
    attempt.audience.ended(finished, None)
    return finished


def _call(attempt: Attempt, call: Callable[[], Any]) -> Any:
    """Call the task; an asynchronous one in a loop whose ORM calls come back into this thread, hence transaction."""
    if not attempt.is_async:
        return attempt.call_sync(call)
    if attempt.loop == "trio":
        return anyio.run(partial(attempt.call_async, call), backend="trio")
    return async_to_sync(attempt.call_async)(call)


def _transition(submission: Submit, performed: PerformedRun) -> Transition:
    now = time.time()
    error = None if performed.error is None else json.dumps(performed.error).encode()
    return Transition(
        run=submission.id,
        version=1,
        task=performed.task,
        status=performed.status,
        attempt=performed.attempts,
        runner=RUNNER,
        attempted_at=now,
        args=json.dumps(submission.args).encode(),
        kwargs=json.dumps(submission.kwargs).encode(),
        row=submission.row,
        created_at=now,
        started_at=now,
        finished_at=now,
        result=None if performed.error else json.dumps(performed.result).encode(),
        error=error,
        failure=error,
        metadata=json.dumps(submission.metadata).encode(),
        tags=submission.tags,
        priority=submission.priority or 0,
        using=submission.using,
    )
