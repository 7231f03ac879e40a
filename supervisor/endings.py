"""Ends runners: at their deadlines, at the gateway's or an operator's word, at the stop of the tree."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from typing import Final

import trio

from supervisor.child import Child
from supervisor.cpu import cpu_of
from supervisor.deadlines import DeadlineLedger, Due
from supervisor.runners import Runner, Runners
from taskkit import failpoints, linux
from taskkit.wire.messages import TOLD, Deadline, Expired

#: The kind of deadline that passes by CPU.
_CPU: Final = "cpu_timeout"

#: Processors that may work for one attempt at the same time.
_PROCESSORS: Final = len(os.sched_getaffinity(0))

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

#: Seconds between looks at the CPU of a runner whose attempt has nearly used up its own, at least.
_CPU_LOOK_SECONDS: Final = 0.2

logger = logging.getLogger("bulkhead.supervisor")


class Endings:
    """Who has to die when, and of what. The first reason for a kill stays the cause.

    Args:
      clock: returns seconds that go on while the machine sleeps.
      on_expired: is told of the deadlines for which no process is ended: of attempts in shared ones, of kinds in
        `TOLD`.
      cpu: returns the seconds of CPU that a process and those it has started have used.
    """

    def __init__(
        self,
        runners: Runners,
        nursery: trio.Nursery,
        clock: Callable[[], float] = linux.boottime,
        on_expired: Callable[[Expired], None] = lambda _: None,
        cpu: Callable[[int], float] = cpu_of,
    ) -> None:
        self._cpu = cpu
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
        if runner is None or runner.exited is not None:
            return
        if order.kind == _CPU:
            self._arm_cpu(runner, order)
        else:
            self._ledger.arm(order, self._clock())
        self._changed.set()

    def _arm_cpu(self, runner: Runner, order: Deadline) -> None:
        known = order.at_most and (order.runner, order.token, _CPU) in self._ledger
        if not known and runner.spec.concurrency == 1:  # whose CPU it is in a shared process nobody can tell
            limit = self._cpu(runner.child.pid) + order.after
            self._look_at_cpu(order.runner, order.token, order.grace, order.after, limit)

    def _look_at_cpu(self, runner: str, token: str, grace: float, left: float, limit: float) -> None:
        """Look at an attempt's CPU no sooner than all processors together could have used up what is left of it."""
        soon = max(left / _PROCESSORS, _CPU_LOOK_SECONDS)
        order = Deadline(runner=runner, token=token, kind=_CPU, after=soon, grace=grace)
        self._ledger.arm(order, self._clock(), limit)

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
                if not self._expire(due) and not self._has_cpu_left(due):
                    logger.info("runner %s: %s; ending it", due.runner, due.kind)
                    self.end(due.runner, due.kind, due.grace)
            with trio.move_on_after(min(self._ledger.next() - self._clock(), _LOOK_SECONDS)):
                await self._changed.wait()

    def _has_cpu_left(self, due: Due) -> bool:
        """Look again later, if the attempt may use more CPU than it has used by now."""
        runner = self._runners.all.get(due.runner)
        if due.kind != _CPU or runner is None or runner.exited is not None:
            return False
        left = due.cpu - self._cpu(runner.child.pid)
        if left > 0:
            self._look_at_cpu(due.runner, due.token, due.grace, left, due.cpu)
        return left > 0

    def _expire(self, due: Due) -> bool:
        """Tell the gateway instead, if the deadline is of a kind that it acts on, or others share the process.

        It is told once more if it does not disarm.
        """
        runner = self._runners.all.get(due.runner)
        alone = runner is None or runner.spec.concurrency == 1
        if not due.token or (alone and due.kind not in TOLD):
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
