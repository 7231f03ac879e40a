"""A Task of Django's own interface while a runner performs it: its result so far, its context, its signals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from django.utils import timezone

from taskkit import current
from taskkit.identifiers import run_id_time
from taskkit.inbox import Inbox
from taskkit.interface import Task, TaskContext, TaskResult, TaskResultStatus, task_finished, task_started
from taskkit.outbox import RunHandle
from taskkit.outcomes import Outcome
from taskkit.results import error_of
from taskkit.times import moment
from taskkit.wire.messages import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadContext(TaskContext):
    """The context of a task that takes one, with what our tasks can do besides."""

    @property
    def run(self) -> current.Speaker:
        """The run, as `taskkit.current_run()` gives it."""
        return current.current_run()

    @property
    def metadata(self) -> dict[str, Any]:
        """What the submission brought along."""
        return self.run.metadata

    @property
    def cancelled(self) -> bool:
        """Whether this attempt was asked to stop."""
        return self.run.cancelled

    def emit(self, type: str, data: Any = None) -> None:
        """See `taskkit.emit`."""
        self.run.emit(type, data)

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """See `taskkit.progress`."""
        self.run.progress(done, total, message)

    def inbox(self, name: str) -> Inbox:
        """Return what others tell the run under this name: `context.inbox("answer").get(timeout=60)`."""
        return self.run.inbox(name)

    @property
    def after(self) -> list[Outcome]:
        """How the runs ended that this one came after."""
        return self.run.after

    def submit(
        self, task: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle:
        """Submit a child: see `taskkit.current.Speaker.submit`."""
        return self.run.submit(task, args, kwargs, **options)

    async def asubmit(self, *args: Any, **kwargs: Any) -> RunHandle:
        """Do what `submit` does, from asyncio or trio."""
        return await self.run.asubmit(*args, **kwargs)

    def wait(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """Wait for children: see `taskkit.current.Speaker.wait`."""
        return self.run.wait(children, timeout)

    async def wait_async(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """Do what `wait` does, from asyncio or trio."""
        return await self.run.wait_async(children, timeout)


class Performance:
    """One attempt as Django's interface sees it.

    Attributes:
      result: with what this process knows; `refresh` asks the database.
    """

    def __init__(self, task: Task[..., Any], start: Start, runner: str) -> None:
        now = timezone.now()
        self.result: TaskResult[Any] = TaskResult(
            task=task,
            id=start.run,
            status=TaskResultStatus.RUNNING,
            enqueued_at=moment(run_id_time(start.run)),
            started_at=now if start.attempt == 1 else None,
            finished_at=None,
            last_attempted_at=now,
            args=msgspec.json.decode(start.args),
            kwargs=msgspec.json.decode(start.kwargs),
            backend=task.backend,
            errors=[],
            worker_ids=[*[""] * (start.attempt - 1), runner],
        )

    @property
    def context(self) -> BulkheadContext:
        """What a task with `takes_context` is called with."""
        return BulkheadContext(task_result=self.result)

    def begun(self) -> None:
        """Send task_started."""
        task_started.send_robust(sender=self._sender, task_result=self.result)

    def succeeded(self, value: Any) -> None:
        """Send task_finished after a return."""
        self._finish(TaskResultStatus.SUCCESSFUL, _return_value=value)
        task_finished.send_robust(sender=self._sender, task_result=self.result)

    def failed(self, error: Mapping[str, Any], raised: BaseException | None) -> None:
        """Send task_finished after an exception, while it is the current one: Django's own receiver logs it."""
        self._finish(TaskResultStatus.FAILED)
        self.result.errors.append(error_of(error))
        try:
            if raised is not None:
                raise raised
        except BaseException:
            task_finished.send_robust(sender=self._sender, task_result=self.result)
        else:
            task_finished.send_robust(sender=self._sender, task_result=self.result)

    def _finish(self, status: TaskResultStatus, **values: Any) -> None:
        for name, value in {"status": status, "finished_at": timezone.now(), **values}.items():
            object.__setattr__(self.result, name, value)  # frozen for the project's code, not for a backend

    @property
    def _sender(self) -> type:
        return type(self.result.task.get_backend())
