"""Which waiting run goes to which runner. Pure: decides, changes nothing but its own queues.

Time is Unix seconds here, as `run_after` is a wall-clock wish of people; moments are monotonic seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gateway.store.rows import RunRow
from gateway.throttle import Gate, Throttle, gate_of

#: Entries (-priority, number) of READY runs, the next one at the head.
_Heap: TypeAlias = list[tuple[int, int]]


@dataclass(slots=True)
class _Shelf:
    """Runs of one gate and pool that were put aside. `back` is the number of the one that was put back."""

    heap: _Heap = field(default_factory=list)
    back: int | None = None


@dataclass(slots=True)
class Queues:
    """READY runs: by pool and priority, or waiting for their time. Entries of runs that left are skipped.

    Larger priority first, then older first. A suspect, which has to have a process for itself, waits in a queue of
    its own; so does a run whose task is held. Such a run is put aside when it comes to the head, and put back when
    its task is let go: each time once, so that a thousand of them in front cost nothing per round.

    So is a run that may not pass its gate (`gateway.throttle`). Of those that wait at an open gate one is put back per
    pool, and the next one when that is taken: ten thousand at one gate cost nobody else anything.
    """

    throttle: Throttle = field(default_factory=Throttle)
    _ready: dict[str, _Heap] = field(default_factory=dict)
    _suspects: dict[str, _Heap] = field(default_factory=dict)
    _held: dict[str, dict[str, _Heap]] = field(default_factory=dict)  # by task and pool
    _shelves: dict[Gate, dict[str, _Shelf]] = field(default_factory=dict)  # by gate and pool
    _later: list[tuple[float, int]] = field(default_factory=list)
    _delayed: list[tuple[float, int]] = field(default_factory=list)
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

    # --- coming and leaving ---------------------------------------------------------------------------------

    def add(self, run: RunRow, now: float) -> None:
        """A run waits. Said again of one that waits already, it changes nothing."""
        if run.no in self._waiting:  # a second entry would outlive the first and give it out before its time
            return
        self._waiting[run.no] = run
        if run.run_after is not None and run.run_after > now:
            heapq.heappush(self._later, (run.run_after, run.no))
        else:
            self._push(run)

    def delay(self, run: RunRow, until: float) -> None:
        """A run waits until `wake` is told of that moment (monotonic): no clock that people set makes it later."""
        if run.no not in self._waiting:
            self._waiting[run.no] = run
            heapq.heappush(self._delayed, (until, run.no))

    def wake(self, moment: float) -> None:
        """It is that moment now."""
        self._ripen(self._delayed, moment)
        for gate in self.throttle.turn(moment):
            for pool in list(self._shelves.get(gate, ())):
                self._put_back(gate, pool)

    def _push(self, run: RunRow) -> None:
        heaps = self._suspects if run.suspect else self._ready
        heapq.heappush(heaps.setdefault(run.pool, []), (-run.priority, run.no))

    def remove(self, no: int) -> None:
        """A run waits no longer."""
        run = self._waiting.pop(no, None)
        if run is None:
            return
        self._follow(run)
        self._left += 1
        if self._left > len(self._waiting) + 100:
            self._sweep()

    def _sweep(self) -> None:
        """Forget the entries of runs that left: submitted and cancelled behind one that waits, they would pile up."""
        self._left = 0
        self._later = [entry for entry in self._later if entry[1] in self._waiting]
        self._delayed = [entry for entry in self._delayed if entry[1] in self._waiting]
        heapq.heapify(self._later)
        heapq.heapify(self._delayed)
        for heap in self._heaps():
            heap[:] = [entry for entry in heap if entry[1] in self._waiting]
            heapq.heapify(heap)

    def _heaps(self) -> Iterator[_Heap]:
        for heaps in (self._ready, self._suspects, *self._held.values()):
            yield from heaps.values()
        for shelves in self._shelves.values():
            for shelf in shelves.values():
                yield shelf.heap

    def _put_aside(self, run: RunRow, pool: str) -> None:
        shelf = self._shelves.setdefault(gate_of(run), {}).setdefault(pool, _Shelf())
        heapq.heappush(shelf.heap, (-run.priority, run.no))
        if shelf.back == run.no:
            shelf.back = None

    def _follow(self, run: RunRow) -> None:
        """A run waits no longer: if it was the one that was put back, another one of its gate follows."""
        shelf = self._shelves.get(gate_of(run), {}).get(run.pool) if self._shelves else None
        if shelf is not None and shelf.back == run.no:
            shelf.back = None
            self._put_back(gate_of(run), run.pool)

    def _put_back(self, gate: Gate, pool: str) -> None:
        """Put the first run back that waits at this gate, unless one is there or the gate is closed."""
        shelf = self._shelves[gate][pool]
        while shelf.heap and shelf.back is None:
            run = self._waiting.get(shelf.heap[0][1])
            if run is not None:
                if not self.throttle.has_room(gate):
                    return
                shelf.back = run.no
                self._push(run)
            heapq.heappop(shelf.heap)
        if not shelf.heap and shelf.back is None:
            del self._shelves[gate][pool]
            if not self._shelves[gate]:
                del self._shelves[gate]

    def hold(self, task: str) -> None:
        """Give out no run of this task until it is let go, but for those on trial."""
        self._held.setdefault(task, {})

    def let_go(self, task: str) -> None:
        """The task is held no longer; its runs have kept their order."""
        for heap in self._held.pop(task, {}).values():
            for _, no in heap:
                run = self._waiting.get(no)
                if run is not None:
                    self._push(run)

    def waits_for(self, no: int) -> bool:
        """Whether this run waits."""
        return no in self._waiting

    # --- giving out -----------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """Return when the next waiting run's time comes (Unix seconds)."""
        return self._first(self._later)

    def next_delayed(self) -> float | None:
        """Return the moment to which the next run is delayed."""
        return self._first(self._delayed)

    def _first(self, heap: list[tuple[float, int]]) -> float | None:
        while heap and heap[0][1] not in self._waiting:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def _ripen(self, heap: list[tuple[float, int]], time: float) -> None:
        while heap and heap[0][0] <= time:
            _, no = heapq.heappop(heap)
            run = self._waiting.get(no)
            if run is not None:
                self._push(run)

    def _settle(self, heap: _Heap, pool: str) -> _Heap:
        """Bring a run to the head of `heap` that may be given out; return the heap."""
        while heap:
            run = self._waiting.get(heap[0][1])
            if run is None:
                heapq.heappop(heap)
            elif run.task in self._held:
                heapq.heappush(self._held[run.task].setdefault(pool, []), heapq.heappop(heap))
            elif not self.throttle.admits(run):
                heapq.heappop(heap)
                self._put_aside(run, pool)
            else:
                break
        return heap

    def take(self, pool: str, now: float) -> RunRow | None:
        """Take out the run of this pool whose turn it is, of those that can share a process."""
        self._ripen(self._later, now)
        return self._pop(self._settle(self._ready.get(pool, []), pool))

    def take_alone(self, pool: str, now: float, trials: Collection[str] = ()) -> RunRow | None:
        """Take out the run of this pool that has to have a process for itself: a suspect, or one of the tasks on trial.

        Their turn is before the others': a suspect has been started before, and of a task one run is tried.
        """
        self._ripen(self._later, now)
        return self._pop(min(self._alone(pool, trials), default=[]))

    def _alone(self, pool: str, trials: Collection[str]) -> list[_Heap]:
        """Return the heaps that have such a run at their head."""
        heaps = [self._settle(self._suspects.get(pool, []), pool)]
        if trials:
            # Of a task that nobody has looked at since it was held, the runs are among the others still.
            self._settle(self._ready.get(pool, []), pool)
            heaps += [self._left_out(self._held[task].get(pool, [])) for task in trials if task in self._held]
        return [heap for heap in heaps if heap]

    def _left_out(self, heap: _Heap) -> _Heap:
        """Return a heap of a held task without entries of runs that left, or nothing if its gate is closed."""
        while heap and heap[0][1] not in self._waiting:
            heapq.heappop(heap)
        return heap if heap and self.throttle.admits(self._waiting[heap[0][1]]) else []

    def _pop(self, heap: _Heap) -> RunRow | None:
        # Its time is not asked again: if the wall clock was set back since it came, the run would be lost here.
        if not heap:
            return None
        run = self._waiting.pop(heapq.heappop(heap)[1])
        self._follow(run)
        return run

    def peek(self, pool: str, now: float) -> RunRow | None:
        """Return the run that `take` would take out."""
        self._ripen(self._later, now)
        heap = self._settle(self._ready.get(pool, []), pool)
        return self._waiting[heap[0][1]] if heap else None

    def waits(self, pool: str, now: float, trials: Collection[str] = ()) -> bool:
        """Whether `take` or `take_alone` would return a run."""
        return self.waits_alone(pool, now, trials) or bool(self._settle(self._ready.get(pool, []), pool))

    def waits_alone(self, pool: str, now: float, trials: Collection[str] = ()) -> bool:
        """Whether `take_alone` would return a run."""
        self._ripen(self._later, now)
        return bool(self._alone(pool, trials))


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


def choose(seats: Iterable[Seat], limit: int, *, alone: bool = False) -> str | None:
    """Return the runner for the next run of a pool, or None.

    `limit` is how many runs the pool performs at once. The least loaded runner is taken, among equals the one with
    the fewest runs left, so that a process is used up before the next one is begun. For a run that has to be `alone`
    it is one without any.
    """
    known = list(seats)
    if sum(seat.open for seat in known) >= limit:
        return None
    free = (seat for seat in known if seat.free and not (alone and seat.open))
    best = min(free, key=lambda s: (s.open, s.left, s.runner), default=None)
    return best.runner if best else None


def sent_home(seats: Iterable[Seat], size: int) -> str | None:
    """Return the runner that has to make way for a run that must be alone, None when a free one comes anyway.

    All `size` processes of the pool may be at work for hours. One that gets no further run is replaced at once, and
    its replacement is free; the least loaded one is chosen, as the most seats come back with it.
    """
    staying = [seat for seat in seats if seat.left > 0]
    if len(staying) < size or not all(seat.open for seat in staying):
        return None
    return min(staying, key=lambda seat: (seat.open, seat.left, seat.runner)).runner


def pools_of(
    limits: Mapping[str, int], queues: Queues, now: float, trials: Collection[str] = ()
) -> list[str]:
    """Return the pools in which a run waits for a runner."""
    return [pool for pool in limits if queues.waits(pool, now, trials)]
