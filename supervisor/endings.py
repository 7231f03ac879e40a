"""Ends runners: at their deadlines, at the gateway's or an operator's word, at the stop of the tree."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Final

import trio

from supervisor.child import Child
from supervisor.deadlines import DeadlineLedger, Due
from supervisor.runners import Runners
from taskkit import failpoints, linux
from taskkit.wire.messages import Deadline, Expired

#: Reasons for which deadlines stand still.
NO_GATEWAY: Final = "no gateway listens"
STALLED: Final = "the store takes nothing"
STOPPING: Final = "the tree stops"

#: Seconds between looks at the clock. Deadlines pass by CLOCK_BOOTTIME, which goes on while the machine sleeps;
#: the timers of the event loop do not.
_LOOK_SECONDS: Final = 30.0

#: Seconds until KILL for a runner that the image before had sent TERM.
_KEPT_GRACE: Final = 1.0

#: Seconds after which a deadline in a shared process is told of again, at least.
_EXPIRED_AGAIN: Final = 0.5

logger = logging.getLogger("bulkhead.supervisor")


class Endings:
    """Who has to die when, and of what. The first reason for a kill stays the cause.

    Args:
      clock: returns seconds that go on while the machine sleeps.
      on_expired: is told of the deadlines of attempts in shared processes, which are not ended for one of them.
    """

    def __init__(
        self,
        runners: Runners,
        nursery: trio.Nursery,
        clock: Callable[[], float] = linux.boottime,
        on_expired: Callable[[Expired], None] = lambda _: None,
    ) -> None:
        self._on_expired = on_expired
        self._runners = runners
        self._nursery = nursery
        self._clock = clock
        self._ledger = DeadlineLedger()
        self._paused: set[str] = set()
        self._changed = trio.Event()
        self.pause(NO_GATEWAY)

    def arm(self, order: Deadline) -> None:
        """Set a deadline of an attempt."""
        failpoints.hit("deadline.set")
        runner = self._runners.all.get(order.runner)
        if runner is not None and runner.exited is None:
            self._ledger.arm(order, self._clock())
            self._changed.set()

    def disarm(self, runner: str, token: str | None = None) -> None:
        """Forget the deadlines of an attempt, or of a dead runner."""
        self._ledger.disarm(runner, token)

    def pause(self, why: str) -> None:
        """Deadlines stand still until `resume` has been told of this reason, and of every other."""
        self._paused.add(why)
        self._ledger.pause(self._clock())
        self._changed.set()

    def resume(self, why: str) -> None:
        """This reason is gone."""
        self._paused.discard(why)
        if not self._paused:
            self._ledger.resume(self._clock())
            self._changed.set()

    @property
    def stalled(self) -> bool:
        """Whether deadlines stand still because the store takes nothing."""
        return STALLED in self._paused

    def held(self) -> list[tuple[float, Due]]:
        """Return the deadlines for another image of this program."""
        return self._ledger.held()

    def keep(self, held: list[tuple[float, Due]], *, stalled: bool) -> None:
        """Go on with the deadlines of the image before, and with what it had begun to end."""
        self._ledger.keep(held)
        if stalled:
            self.pause(STALLED)
        for runner in list(self._runners.all.values()):
            if runner.ordered:
                self.end(runner.spec.id, runner.ordered, _KEPT_GRACE)

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
            for due in self._ledger.due(self._clock()):
                if not self._expire(due):
                    logger.info("runner %s: %s; ending it", due.runner, due.kind)
                    self.end(due.runner, due.kind, due.grace)
            with trio.move_on_after(min(self._ledger.next() - self._clock(), _LOOK_SECONDS)):
                await self._changed.wait()

    def _expire(self, due: Due) -> bool:
        """Tell the gateway instead, when others share the attempt's process; once more if it does not disarm."""
        runner = self._runners.all.get(due.runner)
        if runner is None or runner.spec.concurrency == 1 or not due.token:
            return False
        again = max(due.grace, _EXPIRED_AGAIN)
        order = Deadline(runner=due.runner, token=due.token, kind=due.kind, after=again, grace=due.grace)
        self._ledger.arm(order, self._clock())
        self._on_expired(Expired(runner=due.runner, token=due.token, kind=due.kind))
        return True


async def _end_child(child: Child, grace: float) -> None:
    if grace > 0:
        child.send_signal(signal.SIGTERM)
        with trio.move_on_after(grace):
            await child.wait()
            return
    child.send_signal(signal.SIGKILL)
