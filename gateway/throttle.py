"""Which runs have to wait for others of their task: how many at once, how many in a time. Pure.

Both limits are the task's, and each key (`concurrency_key` of a submission, "" without one) has them to itself: a
*gate* is a task and a key. An attempt takes a place from the moment it is assigned until it has ended; a run that
waits for its next attempt takes none. Every attempt that begins counts against the rate, for as long as its time is
not over: within no time of that length more have begun. One that is assigned and has not begun counts as well,
because nobody knows when it will.

Nothing is kept twice: who takes a place follows from the open attempts, what has begun is in the store, written with
the frame that says so. A gateway that takes over hears of a beginning later than it was, so it is stricter by that, and
never less strict. Between two gateways only the wall clock tells time: set forward meanwhile, it makes the rate that
much looser once.

Moments are monotonic seconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from gateway.store.rows import Batch, BegunRow, RunRow
from taskkit.rates import Rate

#: A task's name and a key.
Gate: TypeAlias = tuple[str, str]

#: Beginnings that are remembered in all; beyond, nothing begins whose rate is limited, until some are out of date. A
#: moment takes 32 bytes, a key with one of them 900.
MOST: Final = 100_000

#: Seconds between two looks at a gate, at least: of a thousand places in a second each would wake the gateway.
_COARSE: Final = 0.01

#: Seconds after which to look again when as many beginnings are remembered as can be.
_CROWDED: Final = 1.0

#: Beginnings after which it pays to forget what is out of date.
_SWEEP: Final = 1_000


@dataclass(frozen=True, slots=True)
class Limit:
    """What a task allows to each of its keys; None: any number."""

    concurrency: int | None = None
    rate: Rate | None = None


@dataclass(slots=True)
class _Gate:
    """What is the case at one gate.

    Attributes:
      open: attempts that are assigned.
      pending: those of them that have not begun.
      begun: when attempts began, oldest first.
      looks: there is a moment at which it is looked at again.
    """

    open: int = 0
    pending: int = 0
    begun: deque[float] = field(default_factory=deque)
    looks: bool = False


class Throttle:
    """Every gate that is in use.

    Args:
      begun: what the store has, oldest first.
      now: Unix seconds.

    Attributes:
      moment: now, in monotonic seconds; `turn` sets it.
    """

    def __init__(self, begun: Iterable[BegunRow] = (), moment: float = 0.0, now: float = 0.0) -> None:
        self.moment = moment
        self._limits: dict[str, Limit] = {}
        self._gates: dict[Gate, _Gate] = {}
        self._looks: list[tuple[float, Gate]] = []
        self._opened: set[Gate] = set()
        self._remembered = 0
        self._since_sweep = 0
        for row in begun:
            self._since_sweep += 1  # what is out of date in the store goes, however often gateways die
            if row.until > now:
                age = min(max(0.0, now - row.at), row.until - row.at)
                self._gates.setdefault((row.task, row.key), _Gate()).begun.append(moment - age)
                self._remembered += 1

    def use(self, limits: Mapping[str, Limit], open: Iterable[tuple[RunRow, bool]]) -> None:
        """These are the limits of tasks from now on; `open` are the runs with an open attempt, and whether it has
        begun."""
        self._opened |= self._gates.keys()
        self._limits = dict(limits)
        self._gates = {gate: found for gate, found in self._gates.items() if gate[0] in limits}
        for found in self._gates.values():
            found.open = found.pending = 0
        for run, begun in open:
            self.assigned(run)
            if begun and (at := self._of(run)) is not None:
                at.pending -= 1
        self._remembered = sum(len(found.begun) for found in self._gates.values())

    def limits(self, task: str) -> bool:
        """Whether the runs of this task have a limit."""
        return task in self._limits

    def _of(self, run: RunRow) -> _Gate | None:
        """Return the gate of a run; None: its task has no limit."""
        if run.task not in self._limits:
            return None
        return self._gates.setdefault(gate_of(run), _Gate())

    # --- what happens ---------------------------------------------------------------------------------------

    def assigned(self, run: RunRow) -> None:
        """A run is given to a runner."""
        if (gate := self._of(run)) is not None:
            gate.open += 1
            gate.pending += 1

    def begun(self, run: RunRow, moment: float, now: float, batch: Batch) -> None:
        """Its attempt begins at `moment`, which may be long after the last `turn`; `now` is Unix seconds."""
        if (gate := self._of(run)) is None:
            return
        gate.pending -= 1
        rate = self._limits[run.task].rate
        if rate is None:
            return
        gate.begun.append(moment)
        self._remembered += 1
        batch.begun.append(BegunRow(run.task, run.concurrency_key, now, now + rate.seconds))
        batch.full = True
        self._since_sweep += 1
        if self._since_sweep >= _SWEEP:
            self._sweep()
            batch.begun_before = now

    def ended(self, run: RunRow, *, begun: bool) -> None:
        """Its attempt has ended, or will not begin."""
        if (gate := self._of(run)) is not None:
            gate.open -= 1
            gate.pending -= not begun
            self._opened.add(gate_of(run))
            if not gate.open and not gate.begun:  # keys come and go: a user's may never come again
                del self._gates[gate_of(run)]

    def _sweep(self) -> None:
        self._since_sweep = 0
        for name, gate in list(self._gates.items()):
            self._forget(gate, self._limits[name[0]].rate)
            if not gate.open and not gate.begun:
                del self._gates[name]

    def _forget(self, gate: _Gate, rate: Rate | None) -> None:
        """Forget what is out of date."""
        while gate.begun and (rate is None or gate.begun[0] + rate.seconds <= self.moment):
            gate.begun.popleft()
            self._remembered -= 1

    # --- what holds -----------------------------------------------------------------------------------------

    def turn(self, moment: float) -> set[Gate]:
        """It is that moment now; return the gates at which there may be room where there was none."""
        self.moment = moment
        while self._looks and self._looks[0][0] <= moment:
            _, name = heapq.heappop(self._looks)
            self._opened.add(name)
            if (gate := self._gates.get(name)) is not None:
                gate.looks = False
        opened, self._opened = self._opened, set()
        return opened

    def next(self) -> float | None:
        """Return the moment at which a gate may open by itself."""
        return self._looks[0][0] if self._looks else None

    def admits(self, run: RunRow) -> bool:
        """Whether this run may be given to a runner now."""
        return run.task not in self._limits or self.has_room(gate_of(run))

    def has_room(self, name: Gate) -> bool:
        """Whether a run may pass this gate now. If only time opens it, it will be among those of `turn`."""
        limit = self._limits.get(name[0])
        if limit is None:
            return True
        gate = self._gates.get(name, _NOBODY)
        if limit.concurrency is not None and gate.open >= limit.concurrency:
            return False  # whose end opens it
        if limit.rate is None:
            return True
        self._forget(gate, limit.rate)
        if self._remembered >= MOST:
            self._sweep()
            if self._remembered >= MOST:
                self._look(name, self.moment + _CROWDED)
                return False
        if gate.pending + len(gate.begun) < limit.rate.starts:
            return True
        if gate.begun:
            self._look(name, max(gate.begun[0] + limit.rate.seconds, self.moment + _COARSE))
        return False

    def _look(self, name: Gate, moment: float) -> None:
        gate = self._gates.setdefault(name, _Gate())
        if not gate.looks:
            gate.looks = True
            heapq.heappush(self._looks, (moment, name))


def gate_of(run: RunRow) -> Gate:
    """Return the gate that a run has to pass, if its task has limits."""
    return run.task, run.concurrency_key


#: What is the case where nothing is.
_NOBODY: Final = _Gate()
