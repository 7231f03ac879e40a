"""Which tasks are over so soon that their next run may wait at a runner which works. Pure.

A runner that gets one run at a time waits for the gateway's commit between two of them, 1 to 2 ms: as long as many a
task takes. So of a task that has been quick of late several runs are given to one process, which begins each when it
is free. What was given ahead is taken back if the process turns out to be busy for longer.
"""

from __future__ import annotations

from typing import Final

#: Seconds that the runs of a quick task take, on average.
QUICK: Final = 0.005

#: Runs in a row that have to be known before a task is taken for quick.
KNOWN: Final = 8

#: Seconds of work that a process has at once: as much as it can do during a round whose commit takes long (a disk that
#: others write to as well). Whatever comes next waits as long at most.
WORK: Final = 0.04

#: Runs that a process has at once, whatever they take: the one it performs, and those that wait there. With two
#: processes 128 a round, so that a commit costs each a hundredth of a millisecond.
DEPTH: Final = 64

#: Seconds without a sign of progress after which a runner gives back what it has not begun.
PATIENCE: Final = 0.1

#: Share of the newest run in the average.
_NEWEST: Final = 0.2


class Paces:
    """How long the runs of each task take: an average that follows the newest, forgotten after a slow or bad one."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, float]] = {}

    def ended(self, task: str, seconds: float) -> None:
        """An attempt has ended by itself after so many seconds."""
        if seconds > 4 * QUICK:
            self.unsettled(task)
            return
        number, average = self._known.get(task, (0, seconds))
        self._known[task] = min(number + 1, KNOWN), average + _NEWEST * (seconds - average)

    def unsettled(self, task: str) -> None:
        """Nothing is known of the task any more: it was slow, or its process died."""
        self._known.pop(task, None)

    def depth(self, task: str) -> int:
        """Return how many runs of a quick task a process may have at once."""
        _, average = self._known.get(task, (0, QUICK))
        return min(DEPTH, int(WORK / max(average, WORK / DEPTH)))

    def is_quick(self, task: str) -> bool:
        """Whether its next run will presumably be over in no time."""
        number, average = self._known.get(task, (0, QUICK))
        return number >= KNOWN and average < QUICK
