"""What runs that kill their processes lead to: tasks held back, runs in quarantine. Pure.

The book tells of every attempt that ends; this room keeps the breaker, its record in the batch, and the queues in
step, and puts it all into words for whoever operates the tree.
"""

from __future__ import annotations

import datetime as dt
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Final

from gateway.breaker import Breaker, Tripped
from gateway.dispatch import Queues
from gateway.documents import CasualtyList, Held
from gateway.store.rows import MAX_QUARANTINED, Batch, Opened, QuarantinedRow, RunRow
from taskkit.lifecycle import Ending
from taskkit.settings import BreakerSettings

#: Quarantined runs that are named in a note.
_NAMED: Final = 3


class Casualties:
    """Keeps count of what crashes.

    Args:
      queues: where the runs of a held task wait.
      runs: every open run by number.
    """

    def __init__(self, settings: BreakerSettings, queues: Queues, runs: Mapping[int, RunRow]) -> None:
        self._breaker = Breaker(settings)
        self._queues = queues
        self._runs = runs
        self._quarantined: OrderedDict[str, QuarantinedRow] = OrderedDict()
        self._held: dict[str, str] = {}  # what is said of each task that is held
        self._changed = True

    def load(
        self, opened: Opened, open_runs: Collection[int], moment: float, now: float, batch: Batch
    ) -> None:
        """Take over what the gateway before has kept; `open_runs` are the numbers of those that have an attempt."""
        self._quarantined.update((row.id, row) for row in opened.quarantined)
        self._breaker.load(opened.breakers, open_runs, moment, now)
        for task in opened.breakers:
            self._keep(task, moment, now, batch)

    def _keep(self, task: str, moment: float, now: float, batch: Batch) -> None:
        """The record of a task has changed: have it written, and its runs wait or not."""
        self._changed = True
        batch.breakers[task] = self._breaker.dump(task, moment, now)
        batch.full = True
        tripped = self._breaker.tripped(moment, task)
        if tripped is None:
            self._queues.let_go(task)
            self._held.pop(task, None)
        else:
            self._queues.hold(task)
            self._held[task] = self._words(tripped, now)

    def _words(self, tripped: Tripped, now: float) -> str:
        run = None if tripped.trial is None else self._runs.get(tripped.trial)
        trial = (
            f"one is tried at {_time(now + tripped.remaining)}"
            if run is None
            else f"run {run.id} is on trial"
        )
        return (
            f"task {tripped.task} is held back: {tripped.crashes} runs of it crashed, the last one: {tripped.cause}; "
            f"{trial}; `bulkhead reset {tripped.task}` lets them all go"
        )

    # --- what happens ---------------------------------------------------------------------------------------

    def ended(self, run: RunRow, ending: Ending, cause: str, moment: float, now: float, batch: Batch) -> None:
        """An attempt has ended."""
        if self._breaker.ended(run.task, run.no, ending, cause, moment):
            self._keep(run.task, moment, now, batch)

    def claimed(self, run: RunRow, moment: float, now: float, batch: Batch) -> None:
        """A run is given to a runner: of a held task it is the one on trial."""
        if self._breaker.holds(run.task):
            self._breaker.trying(run.task, run.no)
            self._keep(run.task, moment, now, batch)

    def reset(self, task: str, moment: float, now: float, batch: Batch) -> bool:
        """Let a task's runs go; return whether it was held."""
        was_held = self._breaker.holds(task)
        if self._breaker.reset(task):
            self._keep(task, moment, now, batch)
        return was_held

    def quarantine(self, run: RunRow, now: float) -> None:
        """A run has killed too many runners."""
        self._changed = True
        self._quarantined[run.id] = QuarantinedRow(run.id, run.task, now)
        while len(self._quarantined) > MAX_QUARANTINED:
            self._quarantined.popitem(last=False)

    def released(self, id: str) -> None:
        """A run is performed again as another one."""
        self._changed = self._quarantined.pop(id, None) is not None or self._changed

    # --- what holds -----------------------------------------------------------------------------------------

    def trials(self, moment: float) -> frozenset[str]:
        """Return the held tasks of which one run may be tried now."""
        return self._breaker.trials(moment)

    def next_trial(self, moment: float) -> float | None:
        """Return when the pause of a held task is over; None when none waits for it."""
        return self._breaker.next_trial(moment)

    def news(self) -> list[str] | None:
        """Return the notes if something has happened since the last call, which every round makes."""
        if not self._changed:
            return None
        self._changed = False
        return self.notes()

    def notes(self) -> list[str]:
        """Return what an operator has to know, in sentences that change only when something happens."""
        notes = [words for _, words in sorted(self._held.items())]
        if self._quarantined:
            rows = list(self._quarantined.values())
            some = "at least " if len(rows) == MAX_QUARANTINED else ""
            newest = ", ".join(f"{row.id} ({row.task})" for row in reversed(rows[-_NAMED:]))
            notes.append(
                f"quarantine: {some}{len(rows)} run{'s' if len(rows) > 1 else ''} since {_time(rows[0].at)}, the "
                f"newest: {newest}; `bulkhead release RUN` performs one again"
            )
        return notes

    def statistics(self, moment: float) -> CasualtyList:
        """Return the held tasks with the seconds that they wait still, and the quarantined runs, newest first."""
        return {
            "held": [self._shown(tripped) for tripped in self._breaker.all_tripped(moment)],
            "quarantined": [
                {"run": row.id, "task": row.task, "at": _time(row.at)}
                for row in reversed(self._quarantined.values())
            ],
        }

    def _shown(self, tripped: Tripped) -> Held:
        run = None if tripped.trial is None else self._runs.get(tripped.trial)
        return {
            "task": tripped.task,
            "remaining": round(tripped.remaining, 3),
            "crashes": tripped.crashes,
            "cause": tripped.cause,
            "trial": None if run is None else run.id,
        }


def _time(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
