"""StreamTask: a row of the project's database that is a task.

How it reaches the database from async code: under asyncio by asgiref's thread-sensitive thread, the one
that Django's own `a*` methods use, so that both see one connection (and one test transaction). Under trio
asgiref does not work; there a worker thread of anyio makes the call, with connections of its own that are
closed after it, because the thread goes away with them otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
from asgiref.sync import sync_to_async
from django.db import connections, models
from django.utils import timezone

from taskkit import current

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _under_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _with_own_connections(call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    try:
        return call(*args, **kwargs)
    finally:
        connections.close_all()


async def _in_thread(call: Callable[..., _R], *args: Any) -> _R:
    """Return `call(*args)`, made in a thread that may use the ORM, from asyncio or trio.

    Cancelled: returns at once, the thread finishes what it does and its outcome is lost. A database that
    hangs must not keep a cancelled task from ending.
    """
    if _under_asyncio():
        return await sync_to_async(call)(*args)
    return await anyio.to_thread.run_sync(_with_own_connections, call, *args, abandon_on_cancel=True)


def _plain(value: Any) -> Any:
    """Return `value` as it looks after a trip through JSON: dates, UUIDs and decimals as text.

    Raises:
      TypeError: JSON cannot express it.
    """
    return msgspec.json.decode(msgspec.json.encode(value))


def _speak_each(values: Iterable[Any], gone: threading.Event) -> Any:
    """Send each value as a `progress` event until `gone` is set; return the last one."""
    last = None
    with contextlib.ExitStack() as stack:
        if isinstance(values, Generator):
            stack.enter_context(contextlib.closing(values))
        for value in values:
            if gone.is_set():
                break
            current.emit("progress", value)
            last = value
    return last


class StreamTask(models.Model):
    """A task with a row of its own: subclass it, add fields, write `process`.

    `process(self)` is a plain method, a coroutine, a generator or an async generator. What it returns is
    the result and becomes `final_value`; what it yields becomes `progress` events. It runs in a runner,
    once per start of the row.

    Options are class attributes, by the names of `@task`: `pool`, `priority`, `timeout`, `soft_timeout`,
    `cpu_timeout`, `stall_timeout`, `schedule_timeout`, `max_attempts`, `backoff`, `concurrency`,
    `rate_limit`, `memory_limit`, `metadata`, `on_lost`, `on_disconnect`, `loop`. A model field of
    such a name is a field, not an option. `submit_fields` lists the fields that a submission over HTTP may set; by
    default all own editable fields that are neither relations nor files.
    """

    pool: ClassVar[str] = "default"
    priority: ClassVar[int] = 0
    timeout: ClassVar[float | None] = None
    soft_timeout: ClassVar[float | None] = None
    cpu_timeout: ClassVar[float | None] = None
    stall_timeout: ClassVar[float | None] = None
    schedule_timeout: ClassVar[float | None] = None
    max_attempts: ClassVar[int] = 1
    backoff: ClassVar[Callable[[BaseException, Any], float | None] | None] = None
    concurrency: ClassVar[int | None] = None
    rate_limit: ClassVar[str | None] = None
    memory_limit: ClassVar[int | None] = None
    metadata: ClassVar[dict[str, Any]] = {}
    on_lost: ClassVar[Literal["retry", "fail"]] = "retry"
    on_disconnect: ClassVar[Literal["continue", "cancel"]] = "continue"
    loop: ClassVar[Literal["asyncio", "trio"] | None] = None
    submit_fields: ClassVar[tuple[str, ...] | None] = None

    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    completed_at = models.DateTimeField(null=True, blank=True)
    final_value = models.JSONField(null=True, blank=True)

    class Meta:
        abstract = True

    def process(self) -> Any:
        """Do the work. Every subclass has to have its own; `manage.py check` says so."""
        raise NotImplementedError(f"{type(self).__name__} needs a method process(self)")

    async def send_event(self, type: str, data: Any = None) -> None:
        """Send an event to everybody who follows this run, as `taskkit.emit`.

        Other tasks of the loop get their turn first, so that a loop of `send_event` can be cancelled.
        Cancelled: nothing was sent.

        Raises:
          ValueError, TypeError: as `taskkit.emit`; nothing was sent.
        """
        await anyio.lowlevel.checkpoint()
        current.emit(type, data)

    def send_event_sync(self, type: str, data: Any = None) -> None:
        """Send an event from synchronous code, as `taskkit.emit`."""
        current.emit(type, data)

    async def process_generator(self, async_gen: AsyncIterator[Any]) -> Any:
        """Send each value of `async_gen` as a `progress` event; return the last one, None when there was
        none.

        The generator is closed in any case.
        """
        last = None
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(async_gen, AsyncGenerator):
                await stack.enter_async_context(contextlib.aclosing(async_gen))
            async for value in async_gen:
                await self.send_event("progress", value)
                last = value
        return last

    async def process_sync_generator(self, gen: Iterable[Any]) -> Any:
        """Send each value of `gen` as a `progress` event; return the last one, None when there was none.

        All of `gen` runs in one thread, so it may block or use the ORM while the event loop serves others.
        Cancelled: returns at once; the thread ends before it would send its next value.
        """
        gone = threading.Event()
        try:
            return await _in_thread(_speak_each, gen, gone)
        finally:
            gone.set()

    async def mark_completed(self, final_value: Any = None) -> None:
        """Save `completed_at` and `final_value`, from asyncio or trio; called for you when `process` has
        returned.

        Cancelled: the row may have been saved or not.

        Raises:
          TypeError: JSON cannot express `final_value`; nothing was saved.
        """
        await _in_thread(self.mark_completed_sync, final_value)

    def mark_completed_sync(self, final_value: Any = None) -> None:
        """Save `completed_at` and `final_value` from synchronous code.

        Raises:
          TypeError: JSON cannot express `final_value`; nothing was saved.
        """
        before = self.final_value, self.completed_at
        self.final_value, self.completed_at = _plain(final_value), timezone.now()
        try:
            self.save(update_fields=["completed_at", "final_value", "updated_at"])
        except BaseException:  # this object must not look completed while its row is not
            self.final_value, self.completed_at = before
            raise
