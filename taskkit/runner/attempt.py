"""One attempt: the run as its task sees it, from the call of user code to its end."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from taskkit import current
from taskkit.errors import InvalidArguments, RunCancelled
from taskkit.identifiers import check_event_name
from taskkit.inbox import Inbox
from taskkit.outbox import RunHandle
from taskkit.outcomes import Outcome
from taskkit.registry import TaskDefinition
from taskkit.runner.announcing import Audience
from taskkit.runner.children import Children, outcomes_of
from taskkit.runner.encode import EventRenderer, failure_of, render
from taskkit.runner.inbox import Mail
from taskkit.wire.messages import Finished, Progress, RunnerSpec, Start

if TYPE_CHECKING:
    from taskkit.runner.performance import Performance

_T = TypeVar("_T")

#: What a generator's yield is called on the stream.
YIELD_EVENT = "progress"

#: Longest wait before another attempt, seconds: 30 days, as long as a schedule could reasonably be off.
MAX_BACKOFF = 30 * 86_400.0

#: Characters of a progress message that are kept: it has to fit the frame of a pipe that the kernel made small.
MAX_PROGRESS_MESSAGE = 200

#: Seconds before the next attempt when the task allows several and has no `backoff`: 2, 4, 8 … at most this.
_MAX_DEFAULT_BACKOFF = 300.0


class Voice(Protocol):
    """Where an attempt's words go: the pipe to the gateway, or a test."""

    def event(self, token: str, type: str, data: bytes) -> None: ...
    def send_progress(self, progress: Progress) -> None: ...


class Attempt:
    """One attempt of a run; implements `taskkit.current.Speaker`.

    Args:
      start: the order.
      definition: the task in this process.
      emitter: where events go.
      spec: the limits of this runner.
      mail: what others tell it.
    """

    def __init__(
        self, start: Start, definition: TaskDefinition, emitter: Voice, spec: RunnerSpec, mail: Mail
    ) -> None:
        self._mail = mail
        self._start = start
        self._definition = definition
        self._emitter = emitter
        self._spec = spec
        self._performance = _performance(definition, start, spec)
        self._children = Children(start.run, spec.pool, start.children, mail)
        self.audience = Audience(self, definition.func or definition.model, self._performance)
        self._metadata: dict[str, Any] = msgspec.json.decode(start.metadata)
        extras: dict[str, Any] = {"_run": start.run, "_attempt": start.attempt}
        if start.row is not None:
            extras |= {"_task_id": start.row.pk, "_app": start.row.app, "_model": start.row.model}
        self._renderer = EventRenderer(extras)

    @property
    def id(self) -> str:
        return self._start.run

    @property
    def attempt(self) -> int:
        return self._start.attempt

    @property
    def task(self) -> str:
        return self._start.task

    @property
    def metadata(self) -> dict[str, Any]:
        return self._metadata

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was asked to stop, as far as this process has heard."""
        return self._mail.cancelled

    @property
    def token(self) -> str:
        """The fence of this attempt."""
        return self._start.token

    def emit(self, type: str, data: Any = None) -> None:
        """See `taskkit.current.emit`."""
        self._emitter.event(self.token, check_event_name(type), self._render(data))

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """See `taskkit.current.progress`."""
        data = self._render({"done": done, "total": total, "message": str(message)[:MAX_PROGRESS_MESSAGE]})
        self._emitter.send_progress(Progress(token=self.token, data=data))

    def inbox(self, name: str) -> Inbox:
        """See `taskkit.inbox.Inbox`; the name is the last part of `POST …/runs/{id}/input/{name}`."""
        return self._mail.inbox(name)

    @property
    def after(self) -> list[Outcome]:
        """How the runs ended that this one came after."""
        return outcomes_of(self._start.after)

    def submit(
        self, task: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> RunHandle:
        """See `taskkit.current.Speaker.submit`."""
        return self._children.submit(task, args, kwargs, **options)

    async def asubmit(self, *args: Any, **kwargs: Any) -> RunHandle:
        """See `taskkit.current.Speaker.asubmit`."""
        return await self._children.asubmit(*args, **kwargs)

    def wait(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """See `taskkit.current.Speaker.wait`."""
        return self._children.wait(children, timeout)

    async def wait_async(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """See `taskkit.current.Speaker.wait_async`."""
        return await self._children.wait_async(children, timeout)

    def _render(self, data: Any) -> bytes:
        rendered = self._renderer.render(data)
        if len(rendered) > self._spec.event_limit:
            raise ValueError(
                f"an event may have {self._spec.event_limit} bytes of JSON (LIMITS.event_bytes), "
                f"this one has {len(rendered)}; store it and send a reference"
            )
        return rendered

    # --- calling user code ---------------------------------------------------------------------------------

    @property
    def is_async(self) -> bool:
        """Whether the task needs an event loop."""
        return self._definition.is_async

    @property
    def loop(self) -> str:
        """The event loop it wants: "asyncio" or "trio"."""
        return self._definition.loop or self._spec.loop

    def prepare(self) -> Callable[[], Any]:
        """Return the call of the task with its arguments. Reads the task's row, so it may block on the database.

        Raises:
          InvalidArguments: they do not fit the signature.
          Exception: the row cannot be read.
        """
        definition = self._definition
        if definition.model is None:
            assert definition.func is not None
            args, kwargs = definition.bind(
                msgspec.json.decode(self._start.args), msgspec.json.decode(self._start.kwargs)
            )
            if self._performance is not None and self._performance.result.task.takes_context:
                args.insert(0, self._performance.context)
            func = definition.func
            return lambda: func(*args, **kwargs)
        row = self._start.row
        if row is None:
            raise InvalidArguments(f"{self.task} is a model task: start a row of it, or submit its `fields`")
        instance = definition.model._base_manager.using(row.using).get(pk=row.pk)
        self._instance = instance
        return instance.process

    @property
    def asks_database(self) -> bool:
        """Whether `prepare` and `complete` do."""
        return self._definition.model is not None

    def complete(self, result: Any) -> None:
        """Mark a model task's row as completed, unless the task has done so. Blocks on the database."""
        if self._definition.model is not None and self._instance.completed_at is None:
            self._instance.mark_completed_sync(result)

    def call_sync(self, call: Callable[[], Any]) -> Any:
        """Call a synchronous task, its generator included; return its result."""
        result = call()
        return self._drive(result) if inspect.isgenerator(result) else result

    def _drive(self, generator: Generator[Any, Any, Any]) -> Any:
        try:
            while True:
                self.emit(YIELD_EVENT, next(generator))
        except StopIteration as stop:
            return stop.value
        finally:
            generator.close()

    async def call_async(self, call: Callable[[], Any]) -> Any:
        """Call an asynchronous task, its generator included; return its result (None for a generator)."""
        result = call()
        if inspect.isasyncgen(result):
            return await self._drive_async(result)
        if inspect.isgenerator(result):
            return self._drive(result)
        return await result if isinstance(result, Awaitable) else result

    async def _drive_async(self, generator: AsyncGenerator[Any, Any]) -> None:
        try:
            async for value in generator:
                self.emit(YIELD_EVENT, value)
                await (
                    anyio.lowlevel.checkpoint()
                )  # a generator that never waits must not keep a cancellation from arriving
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await generator.aclose()

    # --- how it ended --------------------------------------------------------------------------------------

    def returned(self, result: Any) -> Finished:
        """The end after a return; a result that JSON cannot express is the task's failure."""
        try:
            rendered = render(result)
        except Exception as error:  # also what the user's own classes raise while they are looked at
            return self.raised(TypeError(f"the result of {self.task} cannot be stored: {error}"))
        if len(rendered) > self._spec.result_limit:
            limit = self._spec.result_limit
            return conclude(
                self,
                ValueError(
                    f"a result may have {limit} bytes of JSON (LIMITS.result_bytes), not {len(rendered)}"
                ),
            )
        return Finished(token=self.token, ending="returned", result=rendered)

    def gave_in(self) -> Finished:
        """The end after the task gave in to a cancellation."""
        return Finished(token=self.token, ending="cancelled")

    def raised(self, error: BaseException) -> Finished:
        """The end after an exception, with what the task's `backoff` says about another attempt."""
        return Finished(
            token=self.token, ending="raised", failure=failure_of(error), retry_in=self._retry_in(error)
        )

    def _retry_in(self, error: BaseException) -> float | None:
        if self._start.attempt >= self._start.max_attempts or not isinstance(error, Exception):
            return None
        if self._definition.backoff is None:
            return min(2.0**self._start.attempt, _MAX_DEFAULT_BACKOFF)
        wait = self._definition.backoff(error, self)
        if wait is None:
            return None
        if not 0 <= float(wait) <= MAX_BACKOFF:
            raise ValueError(
                f"the backoff of {self.task} returned {wait!r}; it may be 0 to {MAX_BACKOFF:.0f} seconds"
            )
        return float(wait)


def _performance(definition: TaskDefinition, start: Start, spec: RunnerSpec) -> Performance | None:
    if definition.interface is None:
        return None
    from taskkit.runner.performance import Performance  # only a project with Django's Tasks can import it

    return Performance(definition.interface, start, spec.id)


def perform_sync(attempt: Attempt) -> Finished:
    """Perform an attempt of a synchronous task in the calling thread; no event loop is started."""
    current.speaker.set(attempt)
    try:
        call = attempt.prepare()
        attempt.audience.begun()
        result = attempt.call_sync(call)
        attempt.complete(result)
    except RunCancelled:
        return attempt.gave_in()
    except BaseException as error:
        finished = conclude(attempt, error)
        attempt.audience.ended(finished, error)
        return finished
    finished = finish(attempt, result)
    attempt.audience.ended(finished, None)
    return finished


async def perform_async(attempt: Attempt, scope: anyio.CancelScope) -> Finished:
    """Perform an attempt of an asynchronous task inside `scope`, whose cancellation ends it.

    Django's database is asked in a thread: its guard refuses a synchronous query in asyncio's thread, and its
    asynchronous spelling does not work under trio.
    """
    current.speaker.set(attempt)
    raised = None
    try:
        with scope:
            call = await _beside(attempt, attempt.prepare)
            if not attempt.audience.is_empty:
                await _in_thread(attempt.audience.begun)
            result = await attempt.call_async(call)
            # It has returned, whoever asked it to stop.
            if attempt.asks_database:
                with anyio.CancelScope(shield=True):
                    await _in_thread(attempt.complete, result)
    except BaseException as error:
        raised = error
        finished = conclude(attempt, error)
    else:
        finished = attempt.gave_in() if scope.cancelled_caught else finish(attempt, result)
    if not attempt.audience.is_empty:
        with anyio.CancelScope(
            shield=True
        ):  # bounded by the deadline of the attempt, which the supervisor holds
            await _in_thread(attempt.audience.ended, finished, raised)
    return finished


async def _beside(attempt: Attempt, function: Callable[..., _T], *values: Any) -> _T:
    """Call `function` in a thread if it may ask the database, else on the spot: two threads' turns take 0.2 ms."""
    if attempt.asks_database:
        return await _in_thread(function, *values)
    await anyio.lowlevel.checkpoint()
    return function(*values)


async def _in_thread(function: Callable[..., _T], *values: Any) -> _T:
    """Call `function` in a thread, whose connections end with the call: nobody else would close them."""
    from taskkit.threads import with_own_connections  # it imports Django's databases

    return await anyio.to_thread.run_sync(with_own_connections, partial(function, *values))


def finish(attempt: Attempt, result: Any) -> Finished:
    """Return the end after a return, whatever the result's own code does when it is looked at."""
    try:
        return attempt.returned(result)
    except BaseException as error:
        return conclude(attempt, error)


def conclude(attempt: Attempt, error: BaseException) -> Finished:
    """Return the end after `error`, whatever the task's `backoff` does."""
    try:
        return attempt.raised(error)
    except BaseException as broken:  # the user's backoff raised: the attempt has failed all the same
        return Finished(token=attempt.token, ending="raised", failure=failure_of(broken))
