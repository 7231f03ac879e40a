"""Which tasks are held back because their runs keep killing their processes. Pure.

    CLOSED ──`crashes` distinct runs within `period`──► OPEN ──`pause`──► on TRIAL ──it survives──► CLOSED
                                                          ▲                  │
                                                          └──────it crashes──┘  (twice the pause)

A bad deployment kills every run of a task. Quarantine alone would burn them one after the other, three processes
each; the breaker keeps them READY, and lets one at a time find out whether the code is sound again.

Rule 1: only crashes count, each run once. A return forgets them; an exception is no crash, but no success either.

Rule 2: while a task is held, only the run on trial decides. What was begun before says nothing about what is now.

Moments are monotonic seconds that the caller hands in. On disk they are Unix seconds, and whatever the wall clock
did meanwhile, nobody waits longer than the pause.

Source: M. Nygard, Release It! (2nd ed.), "Circuit Breaker".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from taskkit.lifecycle import Ending
from taskkit.settings import BreakerSettings

#: Characters of a cause of death that are kept: it is one line of `status`.
_CAUSE_LENGTH: Final = 200


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One task's circuit as the store has it; times in Unix seconds. `crashes`: run number, time."""

    crashes: list[tuple[int, float]] = []
    until: float | None = None
    pause: float = 0.0
    trial: int | None = None
    cause: str = ""


@dataclass(slots=True)
class _Circuit:
    """One task's circuit. `until` is None while it is closed; `trial` is the number of the run on trial."""

    crashes: dict[int, float] = field(default_factory=dict)
    until: float | None = None
    pause: float = 0.0
    trial: int | None = None
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tripped:
    """A task that is held.

    Attributes:
      remaining: seconds until one of its runs is tried; 0.0 when it may be.
      crashes: runs that tripped it.
      trial: number of the run that is being tried.
      cause: how the last of them died.
    """

    task: str
    remaining: float
    crashes: int
    trial: int | None
    cause: str


class Breaker:
    """The circuits of all tasks that have crashed lately."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._circuits: dict[str, _Circuit] = {}

    def _watches(self, task: str) -> bool:
        exempt = any(fnmatchcase(task, pattern) for pattern in self._settings.exempt)
        return self._settings.crashes > 0 and not exempt

    # --- what happens ---------------------------------------------------------------------------------------

    def ended(self, task: str, run: int, ending: Ending, cause: str, moment: float) -> bool:
        """An attempt of run number `run` has ended; return whether the record of its task has changed."""
        if not self._watches(task):
            return False
        if ending is Ending.CRASHED:
            return self._crashed(task, run, cause, moment)
        circuit = self._circuits.get(task)
        if circuit is None:
            return False
        if circuit.until is not None:
            return self._tried(task, circuit, run, ending)
        if ending is Ending.RETURNED:
            del self._circuits[task]
            return True
        return False

    def _crashed(self, task: str, run: int, cause: str, moment: float) -> bool:
        circuit = self._circuits.setdefault(task, _Circuit())
        if circuit.until is not None:
            if circuit.trial != run:
                return False
            self._open(circuit, min(circuit.pause * 2, self._settings.longest_pause), cause, moment)
            return True
        circuit.crashes = {
            no: at for no, at in circuit.crashes.items() if moment - at <= self._settings.period
        } | {run: moment}
        if len(circuit.crashes) >= self._settings.crashes:
            self._open(circuit, self._settings.pause, cause, moment)
        return True

    def _open(self, circuit: _Circuit, pause: float, cause: str, moment: float) -> None:
        circuit.until, circuit.pause, circuit.trial = moment + pause, pause, None
        circuit.cause = cause[:_CAUSE_LENGTH]

    def _tried(self, task: str, circuit: _Circuit, run: int, ending: Ending) -> bool:
        if circuit.trial != run:
            return False
        if ending is Ending.LOST:  # it says nothing: another one is tried
            circuit.trial = None
        else:
            del self._circuits[task]
        return True

    def trying(self, task: str, run: int) -> None:
        """Run number `run` is on trial: no other begins before it has ended."""
        self._circuits[task].trial = run

    def reset(self, task: str) -> bool:
        """Somebody says that the task is sound again; return whether there was anything to forget."""
        return self._circuits.pop(task, None) is not None

    # --- what holds -----------------------------------------------------------------------------------------

    def holds(self, task: str) -> bool:
        """Whether runs of this task wait, but for the one on trial."""
        circuit = self._circuits.get(task)
        return circuit is not None and circuit.until is not None

    def trials(self, moment: float) -> frozenset[str]:
        """Return the tasks of which one run may be tried now."""
        return frozenset(
            task
            for task, circuit in self._circuits.items()
            if circuit.until is not None and circuit.until <= moment and circuit.trial is None
        )

    def next_trial(self, moment: float) -> float | None:
        """Return when the next pause is over; None when none is under way."""
        ends = [circuit.until for circuit in self._circuits.values() if circuit.until is not None]
        return min((end for end in ends if end > moment), default=None)

    def tripped(self, moment: float, task: str) -> Tripped | None:
        """Return what there is to say of a task that is held; None of any other."""
        circuit = self._circuits.get(task)
        if circuit is None or circuit.until is None:
            return None
        return Tripped(
            task=task,
            remaining=max(0.0, circuit.until - moment),
            crashes=len(circuit.crashes),
            trial=circuit.trial,
            cause=circuit.cause,
        )

    def all_tripped(self, moment: float) -> list[Tripped]:
        """Return the tasks that are held, by name."""
        found = (self.tripped(moment, task) for task in sorted(self._circuits))
        return [tripped for tripped in found if tripped is not None]

    # --- what is kept ---------------------------------------------------------------------------------------

    def dump(self, task: str, moment: float, now: float) -> bytes | None:
        """Return the task's record as JSON, None when there is nothing to keep; `now` is Unix seconds."""
        circuit = self._circuits.get(task)
        if circuit is None:
            return None
        shift = now - moment
        record = Record(
            crashes=[(run, at + shift) for run, at in circuit.crashes.items()],
            until=None if circuit.until is None else circuit.until + shift,
            pause=circuit.pause,
            trial=circuit.trial,
            cause=circuit.cause,
        )
        return msgspec.json.encode(record)

    def load(
        self, records: Mapping[str, bytes], open_runs: Collection[int], moment: float, now: float
    ) -> None:
        """Take over what an earlier gateway kept.

        A trial goes on only if its run is among `open_runs`, those that have an attempt. Tasks that the settings
        no longer watch are let go.
        """
        for task, data in records.items():
            if self._watches(task):
                record = msgspec.json.decode(data, type=Record)
                self._circuits[task] = self._restored(record, open_runs, moment, now)

    def _restored(self, record: Record, open_runs: Collection[int], moment: float, now: float) -> _Circuit:
        period = self._settings.period
        until = None
        pause = min(record.pause, self._settings.longest_pause)
        if record.until is not None:
            until = moment + min(max(0.0, record.until - now), pause)
        return _Circuit(
            crashes={run: moment - min(max(0.0, now - at), period) for run, at in record.crashes},
            until=until,
            pause=pause,
            trial=record.trial if record.trial in open_runs else None,
            cause=record.cause,
        )
