"""What is ordered from runners, each order with the deadline that makes it hold. Pure.

An order goes to the runner, its deadline to the supervisor: whoever dies in between, the other still has its half.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from gateway.plan import Plan
from gateway.state import RunnerState
from gateway.store.rows import AttemptRow, InputRow, RunRow
from taskkit.settings import LimitSettings
from taskkit.wire.messages import Assigned, Cancel, Deadline, Input, Retire, Row, Start, TakeBack

#: Seconds that an attempt may take to begin beyond its timeout. The limit is set before `Start`, so that it holds
#: whoever dies, and set anew when the attempt begins.
_START_SECONDS: Final = 10.0

#: Seconds after which the supervisor says again that a deadline has passed for which it ends nobody: the gateway that
#: it told may have died over it.
_SAID_AGAIN: Final = 30.0

#: Seconds for a shared runner to leave when its runs have ended, at least.
_LEAVE_SECONDS: Final = 1.0


def is_limited(run: RunRow) -> bool:
    """Whether attempts of this run have deadlines from their beginning."""
    limits = (run.timeout, run.soft_timeout, run.cpu_timeout, run.stall_timeout)
    return any(limit is not None for limit in limits)


class Ordering:
    """Gives orders by writing them into the plan of the round."""

    def __init__(self, limits: LimitSettings, plan: Plan) -> None:
        self._limits = limits
        self._plan = plan

    def take_back(self, runner: RunnerState, tokens: list[str]) -> None:
        """Have a runner give back what it has not begun."""
        runner.recalled = True
        self._plan.order(runner.spec.id, TakeBack(tokens=tokens))

    def start(self, run: RunRow, row: AttemptRow, memory_limit: int | None, after: bytes = b"[]") -> None:
        """Have a runner perform an attempt; it ignores one that it knows."""
        self.limit_time(run, row, _START_SECONDS)
        start = Start(
            run=run.id,
            attempt=row.number,
            token=row.token,
            task=run.task,
            args=run.args,
            kwargs=run.kwargs,
            row=None if run.row is None else msgspec.json.decode(run.row, type=Row),
            max_attempts=run.max_attempts,
            metadata=run.metadata,
            memory_limit=memory_limit,
            after=after,
            children=run.children,
        )
        self._plan.order(row.runner, start)

    def hear(self, row: AttemptRow, inputs: Iterable[InputRow]) -> None:
        """Have an attempt hear what its run is told; it ignores what it has heard."""
        for input in inputs:
            told = Input(token=row.token, number=input.number, name=input.name, data=input.data)
            self._plan.order(row.runner, told)

    def limit_time(self, run: RunRow, row: AttemptRow, extra: float = 0.0, *, at_most: bool = False) -> None:
        """Have the supervisor end the attempt at its timeout; a later limit replaces an earlier one.

        With `at_most` an earlier limit stands: no takeover gives an attempt more time.
        """
        if run.timeout is None:
            return
        deadline = Deadline(
            runner=row.runner,
            token=row.token,
            kind="timeout",
            after=run.timeout + extra,
            grace=self._limits.kill_grace_seconds,
            at_most=at_most,
        )
        self._plan.tell(deadline)

    def limit_rest(self, run: RunRow, row: AttemptRow, *, at_most: bool = False) -> None:
        """Limit what an attempt does that has begun, besides the time it takes (`limit_time`)."""
        grace = self._limits.kill_grace_seconds
        for kind, after, wait in (
            ("soft_timeout", run.soft_timeout, _SAID_AGAIN),
            ("silence", run.stall_timeout, _SAID_AGAIN),
            ("cpu_timeout", run.cpu_timeout, grace),
        ):
            if after is not None:
                deadline = Deadline(
                    runner=row.runner, token=row.token, kind=kind, after=after, grace=wait, at_most=at_most
                )
                self._plan.tell(deadline)

    def listen_on(self, row: AttemptRow, seconds: float) -> None:
        """Have the supervisor say in so many seconds that an attempt may have been silent for too long."""
        deadline = Deadline(
            runner=row.runner, token=row.token, kind="silence", after=seconds, grace=_SAID_AGAIN
        )
        self._plan.tell(deadline)

    def rouse(self, row: AttemptRow) -> None:
        """Ask an attempt to stop that has been silent for too long; it is ended when it does not within its grace."""
        deadline = Deadline(
            runner=row.runner,
            token=row.token,
            kind="stall_timeout",
            after=self._limits.cancel_grace_seconds,
            grace=self._limits.kill_grace_seconds,
            at_most=True,
        )
        self._plan.tell(deadline)
        self.ask_to_stop(row, "stall_timeout")

    def cancel(self, row: AttemptRow, grace: float | None = None) -> None:
        """Ask an attempt to stop because somebody wants its run to; it is ended when it does not within its grace.

        Asked again, it gets no more time: whoever is in a hurry shortens the grace, nobody prolongs it.
        """
        deadline = Deadline(
            runner=row.runner,
            token=row.token,
            kind="cancelled",
            after=self._limits.cancel_grace_seconds if grace is None else grace,
            grace=self._limits.kill_grace_seconds,
            at_most=True,
        )
        self._plan.tell(deadline)
        self.ask_to_stop(row, "cancelled")

    def ask_to_stop(self, row: AttemptRow, reason: str) -> None:
        """Ask an attempt to stop; another deadline than a cancellation's holds."""
        self._plan.order(row.runner, Cancel(token=row.token, reason=reason))

    def abandon(self, runner: RunnerState, row: AttemptRow, reason: str) -> None:
        """Go on without an attempt: its runner gets no further run.

        It may not have begun. Then it is cancelled when it does, or does not hear of it at all.
        """
        runner.abandoned += 1
        self.send_home(runner)
        after = self._plan.after
        after.orders = [
            (id, order)
            for id, order in after.orders
            if not (isinstance(order, Start) and order.token == row.token)
        ]
        self.ask_to_stop(row, reason)

    def retire(self, runner: RunnerState) -> None:
        """A runner gets no further run: it finishes what it has, then leaves."""
        runner.retiring = True
        self._plan.order(runner.spec.id, Retire())
        self.see_off(runner)

    def send_home(self, runner: RunnerState) -> None:
        """Retire a runner, and have the supervisor make another one in its place."""
        self.retire(runner)
        self._plan.tell(Assigned(runner=runner.spec.id, last=True))

    def see_off(self, runner: RunnerState) -> None:
        """A shared runner whose runs have all ended leaves soon, or is ended: what it still does was abandoned."""
        if runner.shared and runner.retiring and not runner.tokens and runner.exited is None:
            grace = max(self._limits.kill_grace_seconds, _LEAVE_SECONDS)
            self._plan.tell(
                Deadline(runner=runner.spec.id, token="", kind="abandoned", after=grace, grace=grace)
            )
