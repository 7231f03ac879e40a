"""What a subscriber that cannot keep up is spared.

Only `run.progress` is ever left out, each of which says all that the one before it said; everything else arrives
exactly once, in order.

When it applies: a subscriber reads history first, at whatever speed, and gets all of it. Once it has been level with
the newest event it is live. A live subscriber is behind when it has not been level for BEHIND_SECONDS, or when what it
needs next has left the ring (1,000 events or 1 MiB). While it is behind, what is pending is looked at in portions of up
to one write (see Portion): of a run's `run.progress` in such a portion only the newest is sent, and the number of the
others leads the portion as `stream.lag`. So the newest progress of a run is never the one that is left out. A
client that only ever reads history, however long, never sees a `stream.lag`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec

from gateway.fanout import Entry

#: Seconds without having been level with the newest event. Precedent for a bound of seconds: a person takes a display
#: that is older than this for stuck.
BEHIND_SECONDS: Final = 2.0

#: The one type that may be left out.
PROGRESS: Final = "run.progress"

#: Reads that one portion takes at most: 64 of 64 KiB are 4 MiB, parsed by nobody, in some 30 ms.
READS: Final = 64

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Lag:
    """So many `run.progress` of `run` were left out. It has no id: the client's cursor stays as exact as it is."""

    run: str
    skipped: int


class Pace:
    """Whether a subscriber keeps up. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._level_at: float | None = None

    def level(self, now: float) -> None:
        """It has everything that there is."""
        self._level_at = now

    def behind(self, now: float, *, off_ring: bool) -> bool:
        """Whether it is live, and too far behind."""
        return self._level_at is not None and (off_ring or now - self._level_at > BEHIND_SECONDS)


class Portion(Generic[_T]):
    """What one write to a subscriber that is behind will carry.

    Attributes:
      size: bytes of data of what is kept.
    """

    def __init__(self) -> None:
        self.size = 0
        self._kept: list[_T | None] = []
        self._newest: dict[int, int] = {}  # index in `kept` of a run's newest progress
        self._skipped: Counter[str] = Counter()

    def add(self, pieces: Sequence[_T]) -> None:
        """Add what is pending next; a newer progress takes the place of the one before it."""
        for piece in pieces:
            if isinstance(piece, Entry):
                self.size += len(piece.row.data)
                if piece.row.type == PROGRESS:
                    self._replace(piece)
            self._kept.append(piece)

    def _replace(self, entry: Entry) -> None:
        index = self._newest.get(entry.row.run)
        self._newest[entry.row.run] = len(self._kept)
        if index is None:
            return
        older = self._kept[index]
        assert isinstance(older, Entry)
        self._kept[index] = None
        self.size -= len(older.row.data)
        self._skipped[_run_of(entry.row.data)] += 1

    def pieces(self) -> list[_T | Lag]:
        """Return it all, led by how much was left out."""
        lags = [Lag(run, skipped) for run, skipped in self._skipped.items()]
        return [*lags, *(piece for piece in self._kept if piece is not None)]


class _Data(msgspec.Struct):
    run: str = msgspec.field(name="_run", default="")


_read: Final = msgspec.json.Decoder(_Data).decode


def _run_of(data: bytes) -> str:
    """Return the id of the run that a progress is of, as its own data says."""
    try:
        return _read(data).run
    except msgspec.DecodeError:
        return ""
