"""How many runners a pool should have, decided from what it has. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from taskkit.settings import PoolSettings

#: Most runners asked for by one order: 253 descriptors fit a packet, five per runner; four at a time forks twice as
#: fast as one by one (337 against 158 a second), more gains little and delays the first.
MOST_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class PoolCount:
    """What a pool has.

    Attributes:
      fresh: living runners that can still be given a run.
      retired: living runners that perform their last run.
      births: runners being made.
    """

    fresh: int
    retired: int
    births: int


def wanted(settings: PoolSettings, count: PoolCount) -> int:
    """Return how many runners to make now.

    At rest a pool of size N has N idle runners. Under load each run retires its runner, and at least `standby` fresh
    ones are kept beyond those at work, so that the next run finds one waiting. Processes that perform many runs are
    not retired by their work and need no standby.
    """
    if settings.runs > 1:
        target = -(-settings.size // settings.concurrency)
    else:
        target = max(settings.standby, settings.size - count.retired)
    return max(0, min(MOST_AT_ONCE, target - count.fresh - count.births))
