"""What a task says while it runs: `emit`, `progress`, `current_run`. Imports no Django.

The runner puts a Speaker into the context before it calls user code; these functions find it there, in any thread
or event loop task that inherited the context.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from taskkit.inbox import Inbox
    from taskkit.outbox import RunHandle
    from taskkit.outcomes import Outcome


class Speaker(Protocol):
    """The run as its own task sees it.

    Attributes:
      id: the run's UUIDv7; stable over attempts, so it can serve as an idempotency key.
      attempt: 1, 2, 3 …
      task: the task's name.
      metadata: what the submission brought along.
      after: how the runs ended that this one came after (`submit(…, after=…)`), in that order.
      cancelled: whether this attempt was asked to stop: cancelled, at its soft_timeout, or because the tree stops.
    """

    @property
    def id(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def cancelled(self) -> bool: ...
    @property
    def after(self) -> list[Outcome]: ...

    def emit(self, type: str, data: Any = None) -> None: ...
    def progress(self, done: float, total: float | None = None, message: str = "") -> None: ...
    def inbox(self, name: str) -> Inbox: ...

    def submit(
        self,
        task: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RunHandle:
        """Submit a child of this run, as `taskkit.submit` submits any run.

        The stream of this run tells of the child as long as it is open; a child that is not over by then goes on,
        unless this run was cancelled. Another attempt of this run submits its children again, but for those with a
        `key`: each key is one child, whose end is heard by every attempt.

        Raises:
          ValueError: the run has 1,000 children.
          Exception: as `taskkit.submit`. In every case nothing was submitted.
        """
        ...

    async def asubmit(self, *args: Any, **kwargs: Any) -> RunHandle:
        """Do what `submit` does, from asyncio or trio."""
        ...

    def wait(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """Wait for children of this run; return how each has ended, in their order.

        A task that waits keeps its runner. Where all runners of a pool could wait for one another, give the children
        a pool of their own; or do not wait, and submit what follows with `after=children`.

        Args:
          timeout: seconds for all of them; None waits for as long as the run may take.

        Raises:
          TimeoutError: one has not ended in time.
          RuntimeError: it would wait for ever (a transaction is open, the pool has no other runner), or stop an event
            loop.
          ValueError: one is no child of this run.
        """
        ...

    async def wait_async(self, children: Iterable[RunHandle], timeout: float | None = None) -> list[Outcome]:
        """Do what `wait` does, from asyncio or trio."""
        ...


speaker: ContextVar[Speaker | None] = ContextVar("bulkhead_speaker", default=None)


def current_run() -> Speaker:
    """Return the run that the calling code belongs to.

    Raises:
      RuntimeError: it belongs to none; tasks speak only while Bulkhead runs them.
    """
    found = speaker.get()
    if found is None:
        raise RuntimeError(
            "there is no current run here: emit(), progress() and current_run() work inside a task that a "
            "Bulkhead runner performs, and in threads that copied its context (contextvars.copy_context)"
        )
    return found


def emit(type: str, data: Any = None) -> None:
    """Send an event to everybody who follows this run. Durable, ordered, never conflated.

    `data` may be anything JSON can express, plus dates, UUIDs, decimals and dataclasses; what is no object becomes
    `{"value": data}`. It is encoded before the call returns and never changed. Blocks while the pipe to the gateway
    is full: a task that speaks faster than the store can write waits for itself only.

    Raises:
      ValueError: the name is reserved or unsafe, or the value is too large (`LIMITS.event_bytes`).
      TypeError: the value holds something that JSON cannot express. In both cases nothing was sent.
    """
    current_run().emit(type, data)


def progress(done: float, total: float | None = None, message: str = "") -> None:
    """Tell how far the run is, as an event named `run.progress` with `{done, total, message}`.

    `message` is cut at 200 characters. For frequent calls: when the pipe is three quarters full, only the newest
    value is kept until there is room.
    Use `emit` for what nobody may miss.
    """
    current_run().progress(done, total, message)
