"""What a run can do about other runs: submit children, wait for them, see whom it came after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio
import msgspec
from django.db import connections

from taskkit import outbox
from taskkit.conf import get_settings
from taskkit.inbox import in_event_loop
from taskkit.outbox import RunHandle
from taskkit.outcomes import ENDED, MOST_CHILDREN, Outcome
from taskkit.runner.inbox import Mail
from taskkit.stream_task import StreamTask
from taskkit.threads import in_thread


class Children:
    """The children of one run, as one attempt of it sees them.

    Args:
      run: id of the run.
      pool: of the runner that performs it.
      before: how many the run had when the attempt was ordered.
      mail: what it is told, ends of children among it.
    """

    def __init__(self, run: str, pool: str, before: int, mail: Mail) -> None:
        self._run = run
        self._pool = pool
        self._count = before
        self._mail = mail

    def submit(
        self,
        task: str | Callable[..., Any] | type[StreamTask] | StreamTask,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RunHandle:
        """Submit a child; see `taskkit.current.Speaker.submit`."""
        if self._count >= MOST_CHILDREN:
            raise ValueError(
                f"a run has {MOST_CHILDREN:,} children at most: give each of them more to do, or let children have "
                "children"
            )
        handle = outbox.submit(task, args, kwargs, parent=self._run, **options)
        self._count += handle.new
        return handle

    async def asubmit(self, *args: Any, **kwargs: Any) -> RunHandle:
        """Do what `submit` does, from asyncio or trio."""
        return await in_thread(self.submit, *args, **kwargs)

    def wait(self, children: Iterable[RunHandle], timeout: float | None) -> list[Outcome]:
        """Wait for children; see `taskkit.current.Speaker.wait`."""
        awaited = list(children)
        if in_event_loop():
            raise RuntimeError("wait() would block the event loop: await wait_async()")
        self._check(awaited)
        self._check_commits(awaited)
        ends = None if timeout is None else time.monotonic() + timeout
        outcomes = []
        for child in awaited:
            inbox = self._mail.inbox(ENDED + child.id)
            told = inbox.get(None if ends is None else max(0.0, ends - time.monotonic()))
            inbox.put(told)  # whoever waits for it next
            outcomes.append(Outcome.of(told))
        return outcomes

    async def wait_async(self, children: Iterable[RunHandle], timeout: float | None) -> list[Outcome]:
        """Wait for children from asyncio or trio; see `taskkit.current.Speaker.wait_async`."""
        awaited = list(children)
        self._check(awaited)
        outcomes = []
        with anyio.fail_after(timeout):
            for child in awaited:
                if self._mail.beside:
                    inbox = self._mail.inbox(ENDED + child.id)
                else:  # it may be performed just here, and ask the database
                    inbox = await in_thread(self._mail.inbox, ENDED + child.id)
                told = await inbox.aget()
                inbox.put(told)
                outcomes.append(Outcome.of(told))
        return outcomes

    def _check_commits(self, children: Sequence[RunHandle]) -> None:
        for using in {child.using for child in children}:
            if self._mail.beside and connections[using].in_atomic_block:
                raise RuntimeError(
                    f"the transaction on {using!r} is open: before it commits, no child begins"
                )

    def _check(self, children: Sequence[RunHandle]) -> None:
        """Refuse what would wait for ever.

        Raises:
          ValueError: one is no child of this run.
          RuntimeError: only the runner that waits could perform it.
        """
        pools = get_settings().all_pools
        for child in children:
            if child.parent != self._run:
                raise ValueError(
                    f"run {child.id} is no child of this run: submit it with current_run().submit(…)"
                )
            if child.pool == self._pool and self._pool in pools and pools[self._pool].size == 1:
                raise RuntimeError(
                    f"the pool {self._pool!r} performs one run at a time, which is this one: give the children another "
                    "pool, or submit what follows them with `after=`"
                )


def outcomes_of(after: bytes) -> list[Outcome]:
    """Return what `Start.after` says."""
    return [Outcome.of(told) for told in msgspec.json.decode(after)]
