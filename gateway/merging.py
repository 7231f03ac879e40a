"""Many runs read as one stream from a position on: history, then live, ordered by position in the store.

Rule 1: how far a read may go (the horizon) is fixed in one synchronous step together with what is known to be new, so
an event is never passed by: whatever lies in front of the horizon is published, and its run is known.

Rule 2: a run is read by its own offsets, so a hole is seen as one. What is merged is what the rings have of all runs,
or else what the store has.

Memory: a place per run that is open or has more to read; of ended runs with a tag at most WINDOW at once, those that go
on first, and the horizon stays in front of the next. Events are those of the shared rings, or one read of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from gateway import sse
from gateway.changes import Changes, Watch
from gateway.fanout import Entry, Hub, Subscription
from gateway.following import READ_BYTES, READ_ROWS
from gateway.sse import Cursor, Origin
from gateway.store.protocol import Store
from gateway.store.rows import Mix, Place, RunRow
from gateway.watching import Watcher

#: Ended runs of a tag that are merged at once. Looking at the next position of each takes 2.5 ms.
WINDOW: Final = 1_000


@dataclass(frozen=True, slots=True)
class MixedReset:
    """What the client has is not whole: of `run` the events in front of position `start` were removed ("trimmed"), or
    its cursor is of events that a power cut took ("epoch") or that never were ("ahead"), and all runs begin anew."""

    start: int
    reason: str
    run: str | None = None


MixedPiece = Entry | MixedReset


@dataclass(slots=True)
class _Member:
    """One run in the mix, read up to offset `after`.

    Attributes:
      live: it was level with what was published once.
      last: position of its last event, when the run had ended before it was taken in.
    """

    id: str
    subscription: Subscription
    after: int
    live: bool = False
    last: int | None = None


class _Newcomers(Watch):
    """The runs with one of the tags that were accepted; `wake` is called when there are some."""

    __slots__ = ("_tags", "_wake")

    def __init__(self, changes: Changes, tags: frozenset[str], wake: Callable[[], None]) -> None:
        super().__init__(changes)
        self._tags = tags
        self._wake = wake

    def _put(self, rows: Sequence[RunRow]) -> None:
        # The first version of a run is its acceptance; later ones are of runs that are known.
        new = [row for row in rows if row.version == 1 and not self._tags.isdisjoint(row.tags)]
        if new:
            super()._put(new)
            self._wake()


class Merger:
    """A position in many runs that moves on; see `merging`.

    Args:
      cursor: where to begin; its offset is a position. LATEST: with the newest event of each run that is named or
        open.
      reaches: whether a run accepted later is one that the client may see.
      until_done: done when every named run has ended.
    """

    def __init__(
        self,
        store: Store,
        hub: Hub,
        watcher: Watcher,
        newcomers: Watch,
        mix: Mix,
        cursor: Cursor,
        *,
        reaches: Callable[[RunRow], bool],
        until_done: bool = False,
    ) -> None:
        self._store = store
        self._hub = hub
        self._watcher = watcher
        self._newcomers = newcomers
        self._mix = mix
        self._reaches = reaches
        self._members: dict[int, _Member] = {}
        self._pending: set[int] = set()
        self._named = set(mix.runs)
        self._open = set(mix.runs) if until_done else None
        self._must_look = True
        self._until: int | None = None
        self._latest = cursor.origin is Origin.LATEST
        reason = stale(hub, cursor)
        self._reset = None if reason is None else MixedReset(1, reason)
        self.position = 0 if reason else cursor.offset if cursor.origin is Origin.AFTER else hub.horizon
        self.off_ring = False

    @property
    def done(self) -> bool:
        """Whether every named run has ended, if that is the end."""
        return self._open is not None and not self._open

    @property
    def closing(self) -> bool:
        """Whether the gateway shuts down."""
        return self._hub.closing

    @property
    def cursor(self) -> str:
        """The id that continues behind everything that was read."""
        return str(self.position)

    def close(self) -> None:
        """Leave every run."""
        for member in self._members.values():
            member.subscription.close()
        self._members.clear()

    async def read(self) -> Sequence[MixedPiece]:
        """Return what follows the position, by position, and move behind it; empty: nothing now.

        Raises:
          StoreError: the disk does not answer; nothing has moved.
        """
        while self._look_is_due or self._welcome():
            await self._look()
        # No waiting from here on to `published`: what is published and who is known belong together.
        self._pending |= self._watcher.take() & self._members.keys()
        published = self._hub.horizon
        horizon = published if self._until is None else min(published, self._until)
        found = self._from_rings(horizon)
        self.off_ring = found is None and any(self._members[no].live for no in self._pending)
        entries, bound = found or await self._from_store(horizon)
        pieces = self._pass(entries)
        self.position = max(self.position, bound)
        if bound >= published:
            self._level(published)
        if self._reset is not None:
            pieces.insert(0, self._reset)
            self._reset = None
        return pieces

    async def wait(self) -> None:
        """Return when reading is worth while again. The caller has a deadline."""
        if self._look_is_due:
            await trio.lowlevel.checkpoint()
            return
        await self._watcher.wait()

    # --- who is in the mix ----------------------------------------------------------------------------------

    @property
    def _look_is_due(self) -> bool:
        return self._must_look or (self._until is not None and self.position >= self._until)

    async def _look(self) -> None:
        """Find out who has something to read behind this position."""
        places, self._until = await self._store.places(self._mix, self.position, WINDOW)
        for no in set(self._mix.runs) - {place.no for place in places}:  # retention has removed it
            self._over(no)
        for place in places:
            if place.no not in self._members:
                self._take_in(place)
        self._must_look = self._latest = False
        self._mix = replace(self._mix, runs=())  # they are known from now on

    def _take_in(self, place: Place) -> None:
        after = max(0, place.after - 1) if self._latest else place.after
        if place.open or place.next or after < place.after:
            self._join(place.no, place.id, place.epoch, after, None if place.open else place.last)
        else:
            self._over(place.no)

    def _welcome(self) -> bool:
        """Take in the runs that were accepted since the last read; return whether to look because some were missed."""
        rows, missed = self._newcomers.take()
        for row in rows:
            if row.no not in self._members and self._reaches(row):
                self._join(row.no, row.id, row.epoch, 0)
        self._must_look = missed
        return missed

    def _join(self, no: int, id: str, epoch: int, after: int, last: int | None = None) -> None:
        named = no in self._named
        subscription = self._hub.attach(no, epoch, watcher=self._watcher, counted=named)
        self._members[no] = _Member(id, subscription, after, last=last)
        self._pending.add(no)  # it may have spoken before it was attached to

    def _over(self, no: int) -> None:
        """Nothing follows of this run."""
        if self._open is not None:
            self._open.discard(no)
        self._pending.discard(no)
        member = self._members.pop(no, None)
        if member is not None:
            member.subscription.close()

    # --- what they have said --------------------------------------------------------------------------------

    def _from_rings(self, horizon: int) -> tuple[list[Entry], int] | None:
        """Return what the rings have, and up to which position that is all; None: they do not have all of it."""
        entries: list[Entry] = []
        bound = horizon
        for no in self._pending:
            member = self._members[no]
            batch = member.subscription.batch(member.after, READ_BYTES)
            if batch is None:
                return None
            if batch and member.subscription.news(batch[-1].offset):
                bound = min(bound, batch[-1].row.pos)
            entries += batch
        entries = sorted(
            (entry for entry in entries if entry.row.pos <= bound), key=lambda entry: entry.row.pos
        )
        size = 0
        for index, entry in enumerate(entries):
            size += len(entry.row.data)
            if index and size > READ_BYTES:
                return entries[:index], entries[index - 1].row.pos
        return entries, bound

    async def _from_store(self, horizon: int) -> tuple[list[Entry], int]:
        heads = [(no, self._members[no].after) for no in self._pending]
        rows, bound = await self._store.merged(heads, horizon, READ_ROWS, READ_BYTES)
        return [Entry(row) for row in rows], bound

    def _pass(self, entries: Sequence[Entry]) -> list[MixedPiece]:
        """Move behind `entries`; return them, with a reset in front of each that does not follow its run's last."""
        pieces: list[MixedPiece] = []
        for entry in entries:
            member = self._members[entry.row.run]
            if entry.offset != member.after + 1:
                pieces.append(MixedReset(entry.row.pos, "trimmed", member.id))
            member.after = entry.offset
            pieces.append(_signed(entry, member.id))
            if entry.row.type == sse.STREAM_END:
                self._over(entry.row.run)
        return pieces

    def _level(self, published: int) -> None:
        """Everything that is published, up to there, was read; whoever says more is touched again."""
        for no in list(self._pending):
            member = self._members[no]
            member.live = True
            # The store may be a round ahead of what is published; but this one's end was removed while it was read.
            if member.last is not None and member.last <= published:
                self._over(no)
        self._pending.clear()


def _signed(entry: Entry, run: str) -> Entry:
    """Return an event whose data names its run, as all data does but that of a large value whose file is gone."""
    data = entry.row.data
    if entry.row.blob is None or b'"_run"' in data:
        return entry
    return Entry(entry.row._replace(data=b'{"_run":"%s",%s' % (run.encode(), data.removeprefix(b"{"))))


def stale(hub: Hub, cursor: Cursor) -> str | None:
    """Return why a cursor cannot be continued, or None when it can."""
    if cursor.origin is not Origin.AFTER:
        return None
    if any(low < cursor.offset < high for low, high in hub.gaps):
        return "epoch"
    return "ahead" if cursor.offset > hub.horizon else None


@contextmanager
def merging(
    store: Store,
    hub: Hub,
    changes: Changes,
    mix: Mix,
    cursor: Cursor,
    *,
    reaches: Callable[[RunRow], bool],
    until_done: bool = False,
) -> Iterator[Merger]:
    """Give a Merger. It watches for new runs from the start, so that none falls between the first look and the next."""
    with hub.watcher() as watcher, _Newcomers(changes, frozenset(mix.tags), watcher.wake) as newcomers:
        merger = Merger(store, hub, watcher, newcomers, mix, cursor, reaches=reaches, until_done=until_done)
        try:
            yield merger
        finally:
            merger.close()
