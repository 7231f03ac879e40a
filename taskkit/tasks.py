"""The decorator that makes a module-level function a task.

It only notes: the function stays what it was, can be called, pickled, tested. `taskkit.registry.load` finds
the noted functions later, when all apps are there. Imports no Django.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar, overload

import msgspec
from msgspec import Meta, Struct

from taskkit.identifiers import is_task_name
from taskkit.rates import parse_rate

#: In settings.MIDDLEWARE of a project whose views may run as tasks: there is a task more then.
MIDDLEWARE: Final = "taskkit.middleware.AsyncRequestMiddleware"

_F = TypeVar("_F", bound=Callable[..., Any])

#: What a task's `backoff` may be: (exception, task_result) -> seconds until the next attempt, None to give
#: up.
Backoff = Callable[[BaseException, Any], float | None]


class TaskOptions(Struct, frozen=True, kw_only=True):
    """What can be said about a task where it is defined; the names are those that Django is adopting.

    Attributes:
      name: instead of the function's own; with a dot it replaces the app label as well.
      pool: the pool of runners that performs it.
      priority: -100 … 100, larger is sooner (django.tasks).
      timeout: seconds per attempt, then it is ended (hard); None leaves it to the pool.
      soft_timeout: seconds per attempt, then it is asked to stop: `SoftTimeout` is raised in a synchronous task,
        an asynchronous one is cancelled.
      cpu_timeout: seconds of CPU per attempt, the processes it has started included.
      stall_timeout: seconds without an event, then it is asked to stop, and ended if it does not.
      schedule_timeout: seconds that a run may wait to be started for the first time; then it fails unstarted.
      max_attempts: how often an attempt that raises or crashes may be made, at most.
      backoff: called in the runner with (exception, task_result); seconds until the next attempt, None
        gives up.
      concurrency: runs that may be under way at once, of those that share a `concurrency_key`; None: any number.
      rate_limit: attempts that may begin in any such time, of those that share a `concurrency_key`: "10/m", "3/30s".
      memory_limit: bytes of address space of the runner; None leaves it to the pool.
      metadata: plain data that every run brings along.
      on_lost: whether a run is performed again ("retry") when the machine fails under it, or fails ("fail").
      on_disconnect: whether a run goes on ("continue") without subscribers, or is cancelled ("cancel").
      loop: event loop of an async task; None leaves it to the pool.
    """

    name: str | None = None
    pool: Annotated[str, Meta(pattern=r"^[A-Za-z_]\w*$")] = "default"
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    timeout: Annotated[float, Meta(gt=0)] | None = None
    soft_timeout: Annotated[float, Meta(gt=0)] | None = None
    cpu_timeout: Annotated[float, Meta(gt=0)] | None = None
    stall_timeout: Annotated[float, Meta(gt=0)] | None = None
    schedule_timeout: Annotated[float, Meta(gt=0)] | None = None
    max_attempts: Annotated[int, Meta(ge=1)] = 1
    backoff: Any = None
    concurrency: Annotated[int, Meta(ge=1)] | None = None
    rate_limit: str | None = None
    memory_limit: Annotated[int, Meta(ge=1)] | None = None
    metadata: dict[str, Any] = {}
    on_lost: Literal["retry", "fail"] = "retry"
    on_disconnect: Literal["continue", "cancel"] = "continue"
    loop: Literal["asyncio", "trio"] | None = None


#: Decorated functions by (module, name, line): a reloaded module replaces its own, a second definition of
#: the same name stays visible, so that the registry can refuse it.
_noted: dict[tuple[str, str, int], Callable[..., Any]] = {}


def noted_functions() -> list[Callable[..., Any]]:
    """Return every function decorated so far in this process, in that order."""
    return list(_noted.values())


def options_of(value: object) -> TaskOptions | None:
    """Return what `@task` was given for this function, or None when it is no task."""
    found = getattr(value, "bulkhead", None) if inspect.isroutine(value) else None
    return found if isinstance(found, TaskOptions) else None


def make_options(where: str, given: dict[str, Any]) -> TaskOptions:
    """Return `given` as checked options; `where` begins the message of an error.

    Raises:
      ValueError: an option is wrong; the message names it, its value and the reason. The task author's fault.
    """
    try:
        options = msgspec.convert(given, type=TaskOptions)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        option = re.split(r"\W", path)[0]
        raise ValueError(f"{where}: {option} = {given.get(option)!r}: {reason}") from error
    if options.name is not None and not (options.name.isidentifier() or is_task_name(options.name)):
        raise ValueError(f"{where}: name = {options.name!r}: write an identifier, or several joined by dots")
    if options.backoff is not None and not callable(options.backoff):
        raise ValueError(
            f"{where}: backoff = {options.backoff!r}: write a function of (exception, task_result)"
        )
    if options.rate_limit is not None:
        try:
            parse_rate(options.rate_limit)
        except ValueError as error:
            raise ValueError(f"{where}: rate_limit = {options.rate_limit!r}: {error}") from None
    soft, hard = options.soft_timeout, options.timeout
    if soft is not None and hard is not None and soft >= hard:
        raise ValueError(f"{where}: soft_timeout = {soft!r}: it must be shorter than timeout = {hard!r}")
    try:
        msgspec.json.encode(options.metadata)
    except TypeError as error:
        raise ValueError(f"{where}: metadata = {options.metadata!r}: {error}; write plain data") from error
    return options


def is_async(function: Callable[..., Any]) -> bool:
    """Whether `function` is a coroutine function or an async generator function."""
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def is_generator(function: Callable[..., Any]) -> bool:
    """Whether calling `function` gives a generator, synchronous or not."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _check_function(function: object) -> None:
    if not inspect.isfunction(function):
        raise TypeError(f"@task is for functions, not {function!r}; options are given by name: @task(name=…)")
    if function.__qualname__ != function.__name__ or not function.__name__.isidentifier():
        raise ValueError(
            f"@task on {function.__module__}.{function.__qualname__}: only functions at the top level of a "
            "module can be tasks; a runner finds them there by name"
        )


def _note(function: _F, given: dict[str, Any]) -> _F:
    _check_function(function)
    where = f"@task on {function.__module__}.{function.__name__}"
    options = make_options(where, given)
    if options.loop is not None and not is_async(function):
        raise ValueError(f"{where}: loop = {options.loop!r}: only an async function runs in an event loop")
    vars(function)["bulkhead"] = options
    line = inspect.unwrap(function).__code__.co_firstlineno
    _noted[(function.__module__, function.__name__, line)] = function
    return function


@overload
def task(function: _F, /) -> _F: ...


@overload
def task(
    function: None = None,
    /,
    *,
    name: str | None = None,
    pool: str = "default",
    priority: int = 0,
    timeout: float | None = None,
    soft_timeout: float | None = None,
    cpu_timeout: float | None = None,
    stall_timeout: float | None = None,
    schedule_timeout: float | None = None,
    max_attempts: int = 1,
    backoff: Backoff | None = None,
    concurrency: int | None = None,
    rate_limit: str | None = None,
    memory_limit: int | None = None,
    metadata: dict[str, Any] | None = None,
    on_lost: Literal["retry", "fail"] = "retry",
    on_disconnect: Literal["continue", "cancel"] = "continue",
    loop: Literal["asyncio", "trio"] | None = None,
) -> Callable[[_F], _F]: ...


def task(
    function: _F | None = None,
    /,
    *,
    name: str | None = None,
    pool: str = "default",
    priority: int = 0,
    timeout: float | None = None,
    soft_timeout: float | None = None,
    cpu_timeout: float | None = None,
    stall_timeout: float | None = None,
    schedule_timeout: float | None = None,
    max_attempts: int = 1,
    backoff: Backoff | None = None,
    concurrency: int | None = None,
    rate_limit: str | None = None,
    memory_limit: int | None = None,
    metadata: dict[str, Any] | None = None,
    on_lost: Literal["retry", "fail"] = "retry",
    on_disconnect: Literal["continue", "cancel"] = "continue",
    loop: Literal["asyncio", "trio"] | None = None,
) -> _F | Callable[[_F], _F]:
    """Make a function in an app's `tasks.py` a task: `@task`, or `@task(timeout=60)`; options as
    `TaskOptions`.

    The function may be plain, async, a generator or an async generator, and is returned as it was, with its
    options as the attribute `bulkhead`. Calling it runs it here; `taskkit.submit` has a runner do it.

    Raises:
      TypeError: it is no function.
      ValueError: it is not at the top level of its module, or an option is wrong (the message names it).
    """
    given = {
        "name": name,
        "pool": pool,
        "priority": priority,
        "timeout": timeout,
        "soft_timeout": soft_timeout,
        "cpu_timeout": cpu_timeout,
        "stall_timeout": stall_timeout,
        "schedule_timeout": schedule_timeout,
        "max_attempts": max_attempts,
        "backoff": backoff,
        "concurrency": concurrency,
        "rate_limit": rate_limit,
        "memory_limit": memory_limit,
        "metadata": {} if metadata is None else metadata,
        "on_lost": on_lost,
        "on_disconnect": on_disconnect,
        "loop": loop,
    }
    if function is None:
        return lambda decorated: _note(decorated, given)
    return _note(function, given)
