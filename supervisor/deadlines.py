"""When runners have to be ended: deadlines that stand still while no gateway listens. Pure.

A run must not be ended for being slow while its events pipe is blocked because the gateway is being replaced, so the
ledger is paused then. Time is a monotonic reading in seconds that the caller hands in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from taskkit.wire.messages import Deadline

_FOREVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Due:
    """A deadline has passed: send TERM to the runner now, KILL `grace` seconds later.

    `cpu`: unless the runner has used less than so many seconds of CPU; 0 for those that pass by the clock.
    """

    runner: str
    token: str
    kind: str
    grace: float
    cpu: float = 0.0


class DeadlineLedger:
    """All deadlines of one tree."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str, str], tuple[float, float, float]] = {}
        self._paused_at: float | None = None

    def arm(self, order: Deadline, now: float, cpu: float = 0.0) -> None:
        """Add a deadline, or replace the one of the same runner, token and kind; with `at_most` the earlier stands.

        `cpu` is what `Due` says.
        """
        # While time stands still it is still the moment of the pause; `resume` adds what has stood since then.
        moment = now if self._paused_at is None else self._paused_at
        key, at = (order.runner, order.token, order.kind), moment + order.after
        if not order.at_most or at < self._at.get(key, (_FOREVER, 0.0, 0.0))[0]:
            self._at[key] = (at, order.grace, cpu)

    def disarm(self, runner: str, token: str | None = None) -> None:
        """Forget the deadlines of one attempt, or of a runner that is dead."""
        for key in [key for key in self._at if key[0] == runner and token in (None, key[1])]:
            del self._at[key]

    def pause(self, now: float) -> None:
        """Time stands still from here on."""
        if self._paused_at is None:
            self._paused_at = now

    def resume(self, now: float) -> None:
        """Time goes on: every deadline moves by as long as it stood still."""
        if self._paused_at is None:
            return
        stood, self._paused_at = now - self._paused_at, None
        self._at = {key: (at + stood, grace, cpu) for key, (at, grace, cpu) in self._at.items()}

    def next(self) -> float:
        """Return when the next deadline passes; infinity when none does, or time stands still."""
        if self._paused_at is not None:
            return _FOREVER
        return min((at for at, _, _ in self._at.values()), default=_FOREVER)

    def due(self, now: float) -> list[Due]:
        """Take out and return what has passed, earliest first."""
        if self._paused_at is not None:
            return []
        passed = sorted((at, key, grace, cpu) for key, (at, grace, cpu) in self._at.items() if at <= now)
        for _, key, _, _ in passed:
            del self._at[key]
        return [Due(*key, grace, cpu) for _, key, grace, cpu in passed]

    def held(self) -> list[tuple[float, Due]]:
        """Return all deadlines with their moments, for another ledger to `keep`; those of a pause as it began."""
        return [(at, Due(*key, grace, cpu)) for key, (at, grace, cpu) in self._at.items()]

    def keep(self, held: list[tuple[float, Due]]) -> None:
        """Take over the deadlines of another ledger."""
        self._at |= {(due.runner, due.token, due.kind): (at, due.grace, due.cpu) for at, due in held}

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        """Whether it has a deadline of this runner, token and kind."""
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)
