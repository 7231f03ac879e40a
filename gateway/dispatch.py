"""Which waiting run goes to which runner. Pure: decides, changes nothing but its own queues.

Time is Unix seconds here, as `run_after` is a wall-clock wish of people.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gateway.store.rows import RunRow


@dataclass(slots=True)
class Queues:
    """READY runs: by pool and priority, or waiting for their time. Entries of runs that left are skipped.

    Larger priority first, then older first.
    """

    _ready: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _later: list[tuple[float, int]] = field(default_factory=list)
    _waiting: dict[int, RunRow] = field(default_factory=dict)
    _left: int = 0  # entries of runs that left, at most

    def __len__(self) -> int:
        return len(self._waiting)

    def depth(self) -> dict[str, int]:
        """Return how many runs wait, by pool."""
        depths: dict[str, int] = {}
        for run in self._waiting.values():
            depths[run.pool] = depths.get(run.pool, 0) + 1
        return depths

    def add(self, run: RunRow, now: float) -> None:
        """A run waits. Said again of one that waits already, it changes nothing."""
        if run.no in self._waiting:  # a second entry would outlive the first and give it out before its time
            return
        self._waiting[run.no] = run
        if run.run_after is not None and run.run_after > now:
            heapq.heappush(self._later, (run.run_after, run.no))
        else:
            self._push(run)

    def _push(self, run: RunRow) -> None:
        heapq.heappush(self._ready.setdefault(run.pool, []), (-run.priority, run.no))

    def remove(self, no: int) -> None:
        """A run waits no longer."""
        if self._waiting.pop(no, None) is None:
            return
        self._left += 1
        if self._left > len(self._waiting) + 100:
            self._sweep()

    def _sweep(self) -> None:
        """Forget the entries of runs that left: submitted and cancelled behind one that waits, they would pile up."""
        self._left = 0
        self._later = [entry for entry in self._later if entry[1] in self._waiting]
        heapq.heapify(self._later)
        for pool, heap in self._ready.items():
            self._ready[pool] = [entry for entry in heap if entry[1] in self._waiting]
            heapq.heapify(self._ready[pool])

    def next_due(self) -> float | None:
        """Return when the next waiting run's time comes."""
        while self._later and self._later[0][1] not in self._waiting:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def _ripen(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            _, no = heapq.heappop(self._later)
            run = self._waiting.get(no)
            if run is not None:
                self._push(run)

    def take(self, pool: str, now: float) -> RunRow | None:
        """Take out the run of this pool whose turn it is."""
        self._ripen(now)
        heap = self._ready.get(pool, [])
        while heap:
            _, no = heapq.heappop(heap)
            # Its time is not asked again: if the wall clock was set back since it came, the run would be lost here.
            run = self._waiting.pop(no, None)
            if run is not None:
                return run
        return None

    def waits(self, pool: str, now: float) -> bool:
        """Whether `take` would return a run."""
        self._ripen(now)
        return any(no in self._waiting for _, no in self._ready.get(pool, ()))


@dataclass(frozen=True, slots=True)
class Seat:
    """A runner that can take a run: `open` attempts of `concurrency`, `left` runs in its life."""

    runner: str
    open: int
    concurrency: int
    left: int

    @property
    def free(self) -> bool:
        """Whether it has room for one more."""
        return self.open < self.concurrency and self.left > 0


def choose(seats: Iterable[Seat], limit: int) -> str | None:
    """Return the runner for the next run of a pool, or None.

    `limit` is how many runs the pool performs at once. The least loaded runner is taken, among equals the one with
    the fewest runs left, so that a process is used up before the next one is begun.
    """
    known = list(seats)
    if sum(seat.open for seat in known) >= limit:
        return None
    best = min((seat for seat in known if seat.free), key=lambda s: (s.open, s.left, s.runner), default=None)
    return best.runner if best else None


def pools_of(limits: Mapping[str, int], queues: Queues, now: float) -> list[str]:
    """Return the pools in which a run waits for a runner."""
    return [pool for pool in limits if queues.waits(pool, now)]
