"""Ends runners: at their deadlines, at the gateway's or an operator's word, at the stop of the tree."""

from __future__ import annotations

import contextlib
import logging
import math
import signal

import trio

from supervisor.child import Child
from supervisor.deadlines import DeadlineLedger
from supervisor.runners import Runners
from taskkit.wire.messages import Deadline

logger = logging.getLogger("bulkhead.supervisor")


class Endings:
    """Who has to die when, and of what. The first reason for a kill stays the cause."""

    def __init__(self, runners: Runners, nursery: trio.Nursery) -> None:
        self._runners = runners
        self._nursery = nursery
        self._ledger = DeadlineLedger()
        self._ledger.pause(trio.current_time())
        self._changed = trio.Event()

    def arm(self, order: Deadline) -> None:
        """Set a deadline of an attempt."""
        runner = self._runners.all.get(order.runner)
        if runner is not None and runner.exited is None:
            self._ledger.arm(order, trio.current_time())
            self._changed.set()

    def disarm(self, runner: str, token: str | None = None) -> None:
        """Forget the deadlines of an attempt, or of a dead runner."""
        self._ledger.disarm(runner, token)

    def pause(self) -> None:
        """No gateway listens: deadlines stand still."""
        self._ledger.pause(trio.current_time())
        self._changed.set()

    def resume(self) -> None:
        """A gateway listens again."""
        self._ledger.resume(trio.current_time())
        self._changed.set()

    def end(self, id: str, kind: str, grace: float, detail: str = "") -> None:
        """TERM a runner, and KILL it `grace` seconds later; with a grace of 0 only KILL."""
        runner = self._runners.all.get(id)
        if runner is None or runner.exited is not None:
            return
        if not runner.ordered:
            runner.ordered, runner.detail = kind, detail
        self._nursery.start_soon(_end_child, runner.child, grace)

    async def run(self) -> None:
        """Keep the deadlines, until cancelled."""
        while True:
            self._changed = trio.Event()
            for due in self._ledger.due(trio.current_time()):
                logger.info("runner %s: %s; ending it", due.runner, due.kind)
                self.end(due.runner, due.kind, due.grace)
            at = self._ledger.next()
            with trio.move_on_at(at) if at < math.inf else contextlib.nullcontext():
                await self._changed.wait()


async def _end_child(child: Child, grace: float) -> None:
    if grace > 0:
        child.send_signal(signal.SIGTERM)
        with trio.move_on_after(grace):
            await child.wait()
            return
    child.send_signal(signal.SIGKILL)
