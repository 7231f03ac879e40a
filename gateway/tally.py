"""Counts since this gateway began, for whoever draws curves of them.

Pure. Whoever does something adds one to a plain number; nobody on the way of a stream does more than that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

#: Upper bounds of the histogram of commits, seconds: 0.3 ms is a commit on a quiet machine, 5 s is where requests
#: give up (gateway.engine).
COMMIT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Histogram:
    """How often a value was at most each bound; 0.4 µs per value (measured)."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return what it is now."""
        copied = Histogram(self.bounds)
        copied.counts, copied.sum = self.counts.copy(), self.sum
        return copied

    def buckets(self) -> list[tuple[str, float]]:
        """Return (bound, how many were at most that) as Prometheus has it, the last for all."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(slots=True)
class RunTally:
    """What became of runs.

    Attributes:
      accepted: runs by origin.
      ended: runs by status.
      attempts: attempts by ending.
      exits: runners that have gone, by cause; "left" is one that had nothing more to do.
    """

    accepted: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class StoreTally:
    """What was written: rows of events and lines, transactions with the seconds that they took, failed ones."""

    events: int = 0
    lines: int = 0
    failures: int = 0
    commits: Histogram = field(default_factory=lambda: Histogram(COMMIT_SECONDS))


@dataclass(slots=True)
class StreamTally:
    """What subscribers were sent: events and lines, resets by reason, times that progress was left out."""

    delivered: int = 0
    resets: Counter[str] = field(default_factory=Counter)
    lags: int = 0


@dataclass(slots=True)
class DoorTally:
    """Who came in: connections that are open, were accepted, were refused."""

    open: int = 0
    accepted: int = 0
    refused: int = 0
