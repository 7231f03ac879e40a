"""The backend of Django's own Tasks interface.

    TASKS = {"default": {"BACKEND": "taskkit.backend.BulkheadBackend"}}

Imported while models load, by the first `@task` of a project: imports no models, reads no database.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, Self, TypeVar, overload

from django.core.checks import CheckMessage, Error, Warning
from django.db import transaction

from taskkit import noted, tasks
from taskkit.conf import pool_of
from taskkit.interface import (
    BaseTaskBackend,
    InvalidTask,
    Task,
    TaskResult,
    normalize_json,
    task_backends,
    task_enqueued,
)
from taskkit.tasks import Backoff
from taskkit.threads import in_thread

if TYPE_CHECKING:
    from taskkit.outbox import RunHandle

_P = ParamSpec("_P")
_T = TypeVar("_T")

if TYPE_CHECKING:
    _Task = Task
else:  # Django's own, unlike its backport, takes no types at run time
    _Task = {(_P, _T): Task}

#: What OPTIONS of the backend may hold.
_OPTIONS: Final = frozenset({"DATABASE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadTask(_Task[_P, _T]):
    """A Task with the options that Django is adopting, plus ours; see `taskkit.tasks.TaskOptions`.

    `task` below sets them; so does Django's own decorator on 6.1 and with the backport, while that of 6.0 takes none
    of them. Of these only `metadata` can be changed with `using`: the rest belongs to the task.
    """

    max_attempts: int = 1
    backoff: Backoff | None = None
    concurrency: int | None = None
    rate_limit: str | None = None
    timeout: float | None = None
    soft_timeout: float | None = None
    cpu_timeout: float | None = None
    stall_timeout: float | None = None
    schedule_timeout: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    memory_limit: int | None = None
    on_lost: Literal["retry", "fail"] = "retry"
    on_disconnect: Literal["continue", "cancel"] = "continue"
    loop: Literal["asyncio", "trio"] | None = None

    def __post_init__(self) -> None:
        Task.__post_init__(self)  # by name: super() without arguments fails in a dataclass with slots
        noted.note(self)

    def using(
        self,
        *,
        priority: int | None = None,
        queue_name: str | None = None,
        run_after: datetime | None = None,
        backend: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the same task with other defaults.

        Raises:
          InvalidTask: the backend does not accept it so.
        """
        given: dict[str, Any] = {
            "priority": priority,
            "queue_name": queue_name,
            "run_after": run_after,
            "backend": backend,
            "metadata": metadata,
        }
        return dataclasses.replace(
            self, **{name: value for name, value in given.items() if value is not None}
        )

    def enqueue_on_commit(self, *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Enqueue when the transaction that is open commits; at once without one.

        `enqueue` itself is part of that transaction: rolled back, the run never was. This is for code that has to
        work with other backends as well, and for arguments that are only known to be right at the commit.
        """
        transaction.on_commit(partial(self.enqueue, *args, **kwargs), using=backend_of(self).using)


@overload
def task(function: Callable[_P, _T], /) -> BulkheadTask[_P, _T]: ...


@overload
def task(
    function: None = None,
    /,
    *,
    priority: int = 0,
    queue_name: str = "default",
    backend: str = "default",
    takes_context: bool = False,
    **options: Any,
) -> Callable[[Callable[..., _T]], BulkheadTask[..., _T]]: ...


def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    priority: int = 0,
    queue_name: str = "default",
    backend: str = "default",
    takes_context: bool = False,
    **options: Any,
) -> Any:
    """Make a function a Task, as Django's own decorator does, on every version with the options of `BulkheadTask`.

    Where the settings name another backend, as those of a test may, its Task is made, without our options.

    Raises:
      InvalidTask: it cannot be performed; the message names what is wrong.
      TypeError: there is no such option.
    """
    ours = {field.name for field in dataclasses.fields(BulkheadTask)} - {"func", "run_after"}
    if unknown := sorted(set(options) - ours):
        raise TypeError(f"@task has no option {unknown[0]!r}; it has {', '.join(sorted(ours))}")

    def make(function: Callable[..., Any]) -> Any:
        made = task_backends[backend].task_class
        known = {field.name for field in dataclasses.fields(made)}
        return made(
            func=function,
            priority=priority,
            queue_name=queue_name,
            backend=backend,
            takes_context=takes_context,
            run_after=None,
            **{name: value for name, value in options.items() if name in known},
        )

    return make if function is None else make(function)


def backend_of(task: Task[..., Any]) -> BulkheadBackend:
    """Return the backend of one of our tasks."""
    backend = task.get_backend()
    assert isinstance(backend, BulkheadBackend)
    return backend


class BulkheadBackend(BaseTaskBackend):
    """Runs every task in a process of its own, and streams what it says.

    A queue is the pool of that name; a queue without one goes to the pool "default". OPTIONS: `DATABASE`, the alias of
    the database with the outbox; else the routers decide. One object per thread, so it keeps nothing.
    """

    task_class = BulkheadTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True
    supports_metadata = True

    @property
    def using(self) -> str:
        """The alias of the database that submissions of this backend go to."""
        from taskkit.outbox import alias_of  # it imports models, which may be importing tasks just now

        return str(self.options.get("DATABASE") or alias_of(None))

    def validate_task(self, task: Task[..., Any]) -> None:
        """Check a task where it is defined, or changed with `using`.

        Raises:
          InvalidTask: it cannot be performed; the message names what is wrong.
        """
        super().validate_task(task)
        given = {
            name: getattr(task, name) for name in tasks.TaskOptions.__struct_fields__ if hasattr(task, name)
        }
        given.update(name=None)
        try:
            tasks.make_options(f"@task on {task.module_path}", given)
        except ValueError as error:
            raise InvalidTask(str(error)) from error

    def enqueue(self, task: Task[_P, _T], args: Any, kwargs: Any) -> TaskResult[_T]:
        """Submit a run of `task`, in the transaction that is open on its database, or in one of its own.

        Raises:
          InvalidTask: the task is no longer valid, or no process could find it again.
          InvalidArguments: the function cannot be called so.
          TypeError: an argument is nothing that JSON has. A date is refused, too: the task would get a text.
          DatabaseError: the database does not take it. In every case nothing was submitted.
        """
        from taskkit import results

        self.validate_task(task)
        args, kwargs = normalize_json(list(args)), normalize_json(dict(kwargs))
        result = results.of_submission(task, self._submit(task, args, kwargs), args, kwargs)
        task_enqueued.send(type(self), task_result=result)
        return result

    def _submit(self, task: Task[..., Any], args: Any, kwargs: Any) -> RunHandle:
        from taskkit import outbox
        from taskkit.errors import UnknownTask

        try:
            return outbox.submit(
                task.module_path,
                args,
                kwargs,
                using=self.using,
                pool=pool_of(task.queue_name),
                priority=task.priority,
                run_after=task.run_after,
                metadata=getattr(task, "metadata", {}),
                backend=self.alias,
                queue=task.queue_name,
            )
        except UnknownTask as error:
            raise InvalidTask(
                f"{task.module_path} cannot be found again by the processes that would perform it: define or "
                "import it in the tasks module of an installed app"
            ) from error

    async def aenqueue(self, task: Task[_P, _T], args: Any, kwargs: Any) -> TaskResult[_T]:
        """Do what `enqueue` does, from asyncio or trio."""
        return await in_thread(self.enqueue, task, args, kwargs)

    def get_result(self, result_id: str) -> TaskResult[Any]:
        """Return what has become of a submission, from any process with this database.

        Raises:
          TaskResultDoesNotExist: there is no such run here, or its task is none of Django's interface (any more).
        """
        from taskkit import results

        return results.find(result_id, self.using, self.alias)

    async def aget_result(self, result_id: str) -> TaskResult[Any]:
        """Do what `get_result` does, from asyncio or trio."""
        return await in_thread(self.get_result, result_id)

    def check(self, **kwargs: Any) -> Iterable[CheckMessage]:
        """Report options that do not exist, a database that does not, queues that have no pool of their own."""
        from django.db import connections

        where = f"TASKS[{self.alias!r}]"
        for name in sorted(set(self.options) - _OPTIONS):
            yield Error(
                f"{where}: OPTIONS has no key {name!r}",
                hint=f"It may have {', '.join(sorted(_OPTIONS))}; pools are set in TASKKIT['POOLS'].",
                id="taskkit.E005",
            )
        database = self.options.get("DATABASE")
        if database is not None and database not in connections:
            yield Error(
                f"{where}: OPTIONS['DATABASE'] = {database!r} is not in DATABASES",
                hint=f"It may be {', '.join(map(repr, connections))}; without it the routers decide.",
                id="taskkit.E006",
            )
        for queue in sorted(self.queues):
            if pool_of(queue) != queue:
                yield Warning(
                    f"{where}: the queue {queue!r} has no pool of that name, so its tasks run in 'default'",
                    hint=f"TASKKIT = {{'POOLS': {{{queue!r}: {{'runners': 2}}}}}} gives it runners of its own.",
                    id="taskkit.W002",
                )
