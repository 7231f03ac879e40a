"""The runs of which Django has not heard the newest, as far as memory is given to them. Pure.

Django's database may be away for days, and a run that has ended is in no other memory: what there is no room for
stays in the store, and is read again when there is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView, Iterable, Iterator

from gateway.store.rows import MAX_UNTOLD, RunRow


class Untold:
    """Runs by number, the one that waits longest first.

    Attributes:
      more: the store has others.
    """

    def __init__(self, most: int = MAX_UNTOLD) -> None:
        self._most = most
        self._runs: OrderedDict[int, RunRow] = OrderedDict()
        self.more = False

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[int]:
        return iter(self._runs)

    def __contains__(self, no: int) -> bool:
        return no in self._runs

    def __getitem__(self, no: int) -> RunRow:
        return self._runs[no]

    def items(self) -> ItemsView[int, RunRow]:
        """Return (number, run) in their order."""
        return self._runs.items()

    def get(self, no: int) -> RunRow | None:
        """Return the run with this number, if it is here."""
        return self._runs.get(no)

    @property
    def has_room(self) -> bool:
        """Whether so many have been told that others should be read from the store."""
        return self.more and len(self._runs) <= self._most // 2

    def add(self, run: RunRow) -> None:
        """A run has changed: it waits behind all others."""
        if run.no in self._runs or len(self._runs) < self._most:
            self._runs[run.no] = run
            self._runs.move_to_end(run.no)
        else:
            self.more = True

    def told(self, no: int) -> None:
        """Django has the newest of this run."""
        self._runs.pop(no, None)

    def recall(self, runs: Iterable[RunRow], *, complete: bool) -> None:
        """Take in what the store has; `complete`: it has no others."""
        self.more = not complete
        for run in runs:
            if run.no not in self._runs:
                self.add(run)
