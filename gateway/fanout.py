"""Wakes everybody who follows a run when it has spoken.

One shared ring of rendered events per followed run; a subscriber is a position in it and owns no queue, so an
idle one costs the same however much the run says. What has left the ring is in the store, and both are read
with the same cursor: between history and live there is no seam.

Rule: everything but what waits is synchronous and never raises; the engine calls it between two
commits.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self

import trio

from gateway import sse
from gateway.broadcast import Broadcast
from gateway.store.rows import EventRow, OutputRow, RunRow
from gateway.tally import StreamTally
from gateway.watching import Watcher

#: Most events a ring keeps. At 50 events/s this is 20 s of a stream: any client that is further behind reads
#: joined batches from the store, which is faster for it anyway. Precedent: Mercure's channel of 1000 updates.
RING_EVENTS: Final = 1000

#: Most bytes a ring keeps; bounds the gateway at (followed runs x 1 MiB). Precedent: Centrifugo's queue of 1
#: MiB per *client*.
RING_BYTES: Final = 1024 * 1024

#: Milliseconds until clients of a tree that stops come back, between these two at random so that they do not come
#: together; whoever restarts it needs two or three seconds.
FAREWELL: Final = (500, 5_000)


class Entry:
    """One event, with its SSE bytes rendered at most once for everybody. `epoch` is that of its run."""

    __slots__ = ("_epoch", "_sse", "row")

    def __init__(self, row: EventRow, epoch: int = 0) -> None:
        self.row = row
        self._epoch = epoch
        self._sse: bytes | None = None

    @property
    def offset(self) -> int:
        return self.row.offset

    @property
    def id(self) -> str:
        """The cursor behind this event."""
        return sse.event_id(self._epoch, self.row.offset)

    @property
    def sse(self) -> bytes:
        """The event block as every EventSource gets it."""
        if self._sse is None:
            self._sse = sse.event_bytes(self.id, self.row.type, self.row.data)
        return self._sse

    @property
    def weight(self) -> int:
        """Bytes that the ring accounts for: the data twice (once in its block), 64 bytes around it."""
        return 2 * len(self.row.data) + 64


class Ring:
    """The newest events of a run of this epoch, consecutive, bounded by number and bytes."""

    __slots__ = ("_entries", "_epoch", "weight")

    def __init__(self, epoch: int = 0) -> None:
        self._entries: deque[Entry] = deque()
        self._epoch = epoch
        self.weight = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all: what follows is not consecutive."""
        self._entries.clear()
        self.weight = 0

    def append(self, row: EventRow) -> None:
        """Add the next event; the oldest give way, the new one itself when it alone is too large."""
        if self._entries and row.offset != self._entries[-1].offset + 1:
            self.clear()
        entry = Entry(row, self._epoch)
        self._entries.append(entry)
        self.weight += entry.weight
        while self._entries and (len(self._entries) > RING_EVENTS or self.weight > RING_BYTES):
            self.weight -= self._entries.popleft().weight

    def after(self, offset: int, max_bytes: int) -> list[Entry] | None:
        """Return the events that follow `offset`, at most `max_bytes` of data unless the first alone exceeds
        it.

        None: the next one is not here.
        """
        if not self._entries or offset < self._entries[0].offset - 1:
            return None
        found: list[Entry] = []
        size = 0
        for index in range(offset + 1 - self._entries[0].offset, len(self._entries)):
            entry = self._entries[index]
            size += len(entry.row.data)
            if found and size > max_bytes:
                break
            found.append(entry)
        return found


@dataclass(slots=True)
class _Run:
    """What the hub knows of one run.

    `id` is set while its row is remembered; `tail` and `lines` are None until the engine has said a number.

    `attached` counts the subscriptions, which keep the ring; `subscribers` those of them that follow this very run.
    """

    id: str | None = None
    tail: int | None = None
    lines: int | None = None
    open: bool = False
    ended: bool = False
    ring: Ring | None = None
    attached: int = 0
    subscribers: int = 0
    watchers: set[Watcher] = field(default_factory=set)
    lot: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    output_lot: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def wake(self) -> None:
        self.lot.unpark_all()
        self.output_lot.unpark_all()


class Audience(Protocol):
    """Who is told of a run's first subscriber, and when its last one has left."""

    def came(self, run: int) -> None:
        """Somebody follows a run that nobody followed before. Must not raise or wait."""

    def left(self, run: int) -> None:
        """Nobody follows the run any more. Must not raise or wait."""


class Subscription:
    """One subscriber's view of a run; a context manager, because the ring lives as long as somebody looks."""

    __slots__ = ("_counted", "_hub", "_number", "_run", "_watcher")

    def __init__(self, hub: Hub, number: int, epoch: int, watcher: Watcher | None, counted: bool) -> None:
        self._hub = hub
        self._number = number
        self._watcher = watcher
        self._counted = counted
        self._run = hub._join(number, epoch, watcher, counted)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the run. Once only."""
        self._hub._leave(self._number, self._run, self._watcher, self._counted)

    @property
    def tail(self) -> int | None:
        """Offset of the newest published event; None when the run is not open."""
        return self._run.tail if self._run.open else None

    @property
    def lines(self) -> int | None:
        """Number of the newest published output line; None when there was none since the gateway started."""
        return self._run.lines

    @property
    def ended(self) -> bool:
        """Whether the run has ended since the subscription began."""
        return self._run.ended

    @property
    def closing(self) -> bool:
        """Whether the gateway shuts down."""
        return self._hub.closing

    def count_reset(self, reason: str) -> None:
        """This subscriber is told that it has missed something."""
        self._hub.tally.resets[reason] += 1

    def batch(self, after: int, max_bytes: int = 65536) -> list[Entry] | None:
        """Return the published events that follow `after`; empty when there is none, None: read the store."""
        run = self._run
        if run.tail is not None and after >= run.tail:
            return []
        return None if run.ring is None else run.ring.after(after, max_bytes)

    def news(self, after: int, line: int | None = None) -> bool:
        """Whether there is something that a subscriber at `after` (and output line `line`) has not seen."""
        run = self._run
        if run.ended or self._hub.closing or (run.tail is not None and run.tail > after):
            return True
        return line is not None and run.lines is not None and run.lines > line

    async def wait(self, after: int, line: int | None = None) -> None:
        """Return when there is news for a subscriber at `after`; with `line`, output counts as news.

        At once if there is some already: nothing can slip in between looking and waiting. May return early.
        Waits without a limit of its own; the caller has a deadline. Cancelling it has no effect on anybody.
        """
        if self.news(after, line):
            await trio.lowlevel.checkpoint()
            return
        await (self._run.lot if line is None else self._run.output_lot).park()

    async def wait_end(self) -> None:
        """Return when the run has ended or the gateway shuts down; see `wait` for limits and cancellation."""
        while not (self._run.ended or self._hub.closing):
            await self._run.lot.park()
        await trio.lowlevel.checkpoint()


class Hub:
    """Everybody who follows any run of this gateway.

    Args:
      horizon: position of the newest event in the store when it was opened.
      gaps: ranges of positions whose events a power cut may have taken (gateway.store.rows.Opened).
      fast_path: whether those who are up to date are written to by `broadcast`.

    Attributes:
      horizon: every event up to this position is published, and who accepted its run is told (see `settled`).
      audience: whom first and last subscribers are reported to.
    """

    def __init__(
        self, horizon: int = 0, gaps: Sequence[tuple[int, int]] = (), *, fast_path: bool = True
    ) -> None:
        self.broadcast = Broadcast(fast_path)
        self._runs: dict[int, _Run] = {}
        self._rows: dict[str, RunRow] = {}
        self._published = 0
        self._touched: set[int] = set()
        self._watchers: set[Watcher] = set()
        self.horizon = horizon
        self.gaps = gaps
        self.audience: Audience | None = None
        self.closing = False
        self.farewell = FAREWELL
        self._closing_lot = trio.lowlevel.ParkingLot()
        self.tally = StreamTally()

    def opened(self, run: int, tail: int) -> None:
        """An open run exists: it was accepted, or found at start with newest offset `tail`."""
        state = self._runs.setdefault(run, _Run())
        state.open = True
        state.tail = max(tail, state.tail or 0)
        state.wake()

    def publish(self, run: int, events: Sequence[EventRow]) -> None:
        """Hand out committed events, offsets consecutive, `data` filled in.

        One whose large value could not be read is left to the store, where every subscriber tries by itself.
        """
        if not events:
            return
        state = self._runs.setdefault(run, _Run())
        state.open = not state.ended
        for row in events:
            if state.tail is not None and row.offset <= state.tail:
                continue  # known already: a repeated call must not show anything twice
            state.tail = row.offset
            if state.ring is None:
                continue
            if row.blob is None or row.data:
                state.ring.append(row)
            else:
                state.ring.clear()
        self._published += len(events)
        self._touched.add(run)
        state.wake()
        self.broadcast.news(run)

    def settled(self, horizon: int) -> None:
        """Everything up to position `horizon` is published: now who follows many runs may read up to there.

        Runs are published one after the other; read in between, a merge by position would miss what comes late.
        """
        self.horizon = max(self.horizon, horizon)
        for run in self._touched:
            state = self._runs.get(run)
            for watcher in () if state is None else state.watchers:
                watcher.touch(run)
        self._touched.clear()

    def publish_output(self, run: int, rows: Sequence[OutputRow]) -> None:
        """Tell those who read output that there are committed lines; they read them from the store.

        Few subscribers ask for output, and a task may print thousands of lines a second: a ring of lines
        would cost memory for nobody, and reading the store joins what came together.
        """
        state = self._runs.get(run)
        if not rows or state is None:
            return
        state.lines = max(rows[-1].offset, state.lines or 0)
        state.output_lot.unpark_all()

    def ended(self, run: int) -> None:
        """The run's `stream.end` has been published."""
        state = self._runs.get(run)
        if state is None:
            return
        state.open, state.ended = False, True
        self._forget(state)
        if not state.attached:
            del self._runs[run]
        state.wake()

    def subscribers(self, run: int) -> int:
        """Return how many follow this run now."""
        state = self._runs.get(run)
        return 0 if state is None else state.subscribers

    def end_streams(self, farewell: tuple[int, int] = FAREWELL) -> None:
        """The gateway shuts down: every stream ends cleanly, a later one at once.

        `farewell` is how many milliseconds later, at least and at most, a client is told to come back.
        """
        self.closing = True
        self.farewell = farewell
        for state in self._runs.values():
            state.wake()
        for watcher in self._watchers:
            watcher.wake()
        self.broadcast.end()
        self._closing_lot.unpark_all()

    async def wait_closing(self) -> None:
        """Return when the gateway shuts down. Waits without a limit of its own; cancelling it has no effect."""
        if self.closing:
            await trio.lowlevel.checkpoint()
        else:
            await self._closing_lot.park()

    def remember(self, row: RunRow) -> None:
        """Keep the row of a run that somebody follows, as `followed` returns it."""
        state = self._runs.get(row.no)
        if state is not None and state.open and state.attached and state.id is None:
            state.id = row.id
            self._rows[row.id] = row

    def followed(self, id: str) -> RunRow | None:
        """Return a row of the run with this id if it is open, and followed; None: read it.

        What does not change is right. Its tail and its number of lines are those of some earlier moment, which is as
        good for whoever attaches to it: a subscription knows the newest ones.
        """
        return self._rows.get(id)

    def attach(
        self, run: int, epoch: int = 0, *, watcher: Watcher | None = None, counted: bool = True
    ) -> Subscription:
        """Return a subscription to the run with this number, open or not; use it as a context manager.

        `epoch` is the run's: it grows only when the store is opened, so everybody who attaches says the same.
        `watcher` is touched when the run has spoken. Without `counted` it is none of the run's subscribers.
        """
        return Subscription(self, run, epoch, watcher, counted)

    @contextlib.contextmanager
    def watcher(self) -> Iterator[Watcher]:
        """Give a watcher for any number of subscriptions; it is woken at shutdown as well."""
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def statistics(self) -> dict[str, int]:
        """Return counts of what the hub holds now, and of what it has handed out."""
        rings = [state.ring for state in self._runs.values() if state.ring is not None]
        return {
            "runs": len(self._runs),
            "subscribers": sum(state.subscribers for state in self._runs.values()),
            "multiplexed": len(self._watchers),
            "ring_events": sum(len(ring) for ring in rings),
            "ring_bytes": sum(ring.weight for ring in rings),
            "published": self._published,
            "riders": self.broadcast.riders,
            "fast_deliveries": self.broadcast.deliveries,
            "shortfalls": self.broadcast.shortfalls,
        }

    def _join(self, number: int, epoch: int, watcher: Watcher | None, counted: bool) -> _Run:
        state = self._runs.setdefault(number, _Run())
        state.attached += 1
        if state.ring is None:
            state.ring = Ring(epoch)
        if watcher is not None:
            state.watchers.add(watcher)
        if counted:
            state.subscribers += 1
            if state.subscribers == 1 and self.audience is not None:
                self.audience.came(number)
        return state

    def _forget(self, state: _Run) -> None:
        if state.id is not None:
            del self._rows[state.id]
            state.id = None

    def _leave(self, number: int, state: _Run, watcher: Watcher | None, counted: bool) -> None:
        state.attached -= 1
        if watcher is not None:
            state.watchers.discard(watcher)
        if counted:
            state.subscribers -= 1
            if not state.subscribers and self.audience is not None:
                self.audience.left(number)
        if state.attached:
            return
        state.ring = None
        self._forget(state)
        if not state.open and self._runs.get(number) is state:
            del self._runs[number]
