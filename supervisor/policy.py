"""When a child that died is started again: OTP's restart intensity with exponential backoff. Pure.

Time is a monotonic reading in seconds that the caller hands in: a wall clock can step back, and then a restart would
never age out.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Final

#: First and longest wait before a restart, seconds (PM2 and s6 use 0.1-1 and 15-30).
FIRST_DELAY: Final = 0.1
LONGEST_DELAY: Final = 30.0

#: Seconds of being ready after which the past is forgotten.
FORGET_AFTER: Final = 60.0


@dataclass(slots=True)
class RestartPolicy:
    """At most `intensity` restarts within `period` seconds, each after a longer wait.

    Source: Erlang/OTP supervisor(3), restart intensity and period; the backoff is ours, because a child that dies at
    once would use up any intensity in a moment.

    Attributes:
      intensity: restarts within `period` before giving up; None never gives up.
      longest_delay: seconds that the waits grow to.
      jitter: source of random numbers, for tests.
    """

    intensity: int | None = 10
    # A child that dies at once needs 61-81 s for its 11 deaths, as the waits between them grow: within 60 s it would
    # never be one too many.
    period: float = 120.0
    longest_delay: float = LONGEST_DELAY
    jitter: random.Random = field(default_factory=random.Random)
    _restarts: deque[float] = field(default_factory=deque)
    _streak: int = 0
    _ready_at: float | None = None

    def ready(self, now: float) -> None:
        """The child is ready, since now unless it was before: of many children, that none has died since."""
        if self._ready_at is None:
            self._ready_at = now

    def died(self, now: float) -> float | None:
        """Count one death; return seconds to wait before the restart, or None to give up."""
        if self._ready_at is not None and now - self._ready_at >= FORGET_AFTER:
            self._restarts.clear()
            self._streak = 0
        self._ready_at = None
        while self._restarts and now - self._restarts[0] > self.period:
            self._restarts.popleft()
        self._restarts.append(now)
        if self.intensity is not None and len(self._restarts) > self.intensity:
            return None
        delay: float = min(FIRST_DELAY * 2**self._streak, self.longest_delay)
        self._streak = min(self._streak + 1, 16)
        # Up to a quarter less, so that children which died together do not come back together.
        return delay * (1 - 0.25 * self.jitter.random())

    @property
    def restarts(self) -> int:
        """Restarts within the period, for `status`."""
        return len(self._restarts)
