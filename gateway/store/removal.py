"""What retention may take out of a store, in words that do not know of SQL. Pure data.

Rule 1: an open run keeps its newest event and its state; a run's last event, `stream.end`, goes with the run only.

Rule 2: of a run's events and lines the oldest go first, so that what is kept has no hole.

Rule 3: a run, or its result, stays until Django has its newest version.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class OldEvents:
    """Events and output lines from before `before` (Unix seconds)."""

    before: float


@dataclass(frozen=True, slots=True)
class OldestEvents:
    """The oldest events and output lines of all, until `size` bytes of them are gone."""

    size: int


@dataclass(frozen=True, slots=True)
class SurplusEvents:
    """All but the newest `keep` events, and all but the newest `keep` lines, of one run."""

    run: int
    keep: int


@dataclass(frozen=True, slots=True)
class OldRuns:
    """Runs that ended before `before`, with everything that belongs to them."""

    before: float


@dataclass(frozen=True, slots=True)
class OldResults:
    """Results of runs that ended before `before`; the runs stay."""

    before: float


@dataclass(frozen=True, slots=True)
class OldKeys:
    """Idempotency keys first used before `before`."""

    before: float


@dataclass(frozen=True, slots=True)
class OldGrants:
    """Used tickets, and revocations of tokens, that had expired before `before`."""

    before: float


Removal = OldEvents | OldestEvents | SurplusEvents | OldRuns | OldResults | OldKeys | OldGrants


@dataclass(slots=True)
class Removed:
    """What one slice took out, or several added up.

    Attributes:
      size: bytes of events and lines, as `Usage.event_bytes` counts them.
      blobs: names of large values that nothing refers to any more; their files are still there.
      more: there is more of the same.
    """

    events: int = 0
    lines: int = 0
    runs: int = 0
    results: int = 0
    keys: int = 0
    grants: int = 0
    size: int = 0
    blobs: list[str] = field(default_factory=list)
    more: bool = False

    @property
    def rows(self) -> int:
        """How many rows a person would count."""
        return self.events + self.lines + self.runs + self.results + self.keys + self.grants

    def add(self, other: Removed) -> None:
        """Count another slice in; `more` is that of the newest."""
        self.events += other.events
        self.lines += other.lines
        self.runs += other.runs
        self.results += other.results
        self.keys += other.keys
        self.grants += other.grants
        self.size += other.size
        self.blobs += other.blobs
        self.more = other.more


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long a run's stream is: offset of its newest event, number of its newest line."""

    run: int
    open: bool
    tail: int
    lines: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store takes of the disk, bytes.

    Attributes:
      file: the database.
      wal: what is committed and not yet copied into the database.
      free: of `file`, in pages that hold nothing.
      events: data of events and lines with ROW_BYTES each; None before they were weighed once.
      blobs, blob_bytes: number and size of the large values.
      incremental: whether free pages can be given back piece by piece.
    """

    file: int
    wal: int
    free: int
    events: int | None
    blobs: int
    blob_bytes: int
    incremental: bool
