"""One run read from a cursor on: history, then live, without a seam.

Rule: an event is read from the ring if it is there, else from the store, always by its offset; where it comes
from makes no difference to what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

from gateway import sse
from gateway.fanout import Entry, Hub, Subscription
from gateway.leaving import Client
from gateway.snapshot import log_data
from gateway.sse import Cursor, Origin
from gateway.store.protocol import Store
from gateway.store.rows import OutputRow, RunRow

#: Most bytes of data in one read, so that one write that a slow line takes stays within the write deadline.
READ_BYTES: Final = 64 * 1024

#: Most events or lines in one read; at 130 bytes each that is READ_BYTES as well.
READ_ROWS: Final = 500

#: Seconds between two looks at a run that is open in the store while the hub does not know it (yet): its
#: accept is committed and not yet announced, which takes microseconds, or the gateway has just started.
POLL: Final = 0.5

#: Seconds to wait when an output line is in the store ahead of the event that it follows.
HELD: Final = 0.05


@dataclass(frozen=True, slots=True)
class Line:
    """An output line on its way out. `position` is the offset of the newest event in front of it."""

    row: OutputRow
    position: int
    epoch: int = 0

    @property
    def id(self) -> str:
        """The cursor behind this line."""
        return sse.event_id(self.epoch, self.position, self.row.offset)

    def data(self, run: str) -> bytes:
        """Return the line as the data of a `log` event."""
        return log_data(self.row, run)


@dataclass(frozen=True, slots=True)
class Reset:
    """The events in front of `start` cannot be had: they were removed, never were, or are others now.

    `reason`: "trimmed" (by retention), "ahead" (the cursor is behind the newest event, or of an epoch that never
    was), "epoch" (the machine lost power, and with it perhaps events that the client has seen).
    """

    start: int
    reason: str
    epoch: int = 0

    @property
    def id(self) -> str:
        """The cursor in front of `start`."""
        return sse.event_id(self.epoch, max(0, self.start - 1))


Piece = Entry | Line | Reset


class Follower:
    """A position in a run's stream that moves on.

    Args:
      output: whether output lines are wanted, between the events where they were printed.
    """

    def __init__(
        self, store: Store, subscription: Subscription, run: RunRow, cursor: Cursor, *, output: bool = False
    ) -> None:
        self._store = store
        self._subscription = subscription
        self._run = run
        tail = max(run.tail, subscription.tail or 0)
        self.after = cursor.resolve(tail)
        self._reason = "trimmed"
        other_epoch = not cursor.is_of(run.epoch)
        self._must_reset = other_epoch or self.after > tail
        if self._must_reset:
            # The client saw events that the store lost, or made its cursor up: begin anew, and say so.
            self.after = 0
            self._reason = "epoch" if other_epoch and cursor.epoch < run.epoch else "ahead"
        self._output = output
        self._line = cursor.line if not self._must_reset else None
        if cursor.origin is Origin.NOW:
            self._line = max(run.lines, subscription.lines or 0)
        self._more_lines = output
        self._held = False
        self._unknown = False
        self.done = False
        #: whether what was read last had left the ring, so that it came from the store
        self.off_ring = False

    @property
    def closing(self) -> bool:
        """Whether the gateway shuts down."""
        return self._subscription.closing

    @property
    def cursor(self) -> str:
        """The id of this position: what is in front of it has been read."""
        return sse.event_id(self._run.epoch, self.after, self._line if self._output else None)

    @property
    def position(self) -> str:
        """The id of the event that was read last, whatever was printed behind it."""
        return sse.event_id(self._run.epoch, self.after)

    async def read(self) -> list[Piece]:
        """Return what follows the position, and move behind it; empty: nothing now. Sets `done` at the end.

        Raises:
          StoreError: the disk does not answer; nothing has moved.
        """
        before = self.after
        pieces: list[Piece] = []
        entries = await self._entries(pieces)
        lines = await self._lines() if self._output else []
        pieces += self._merge(entries, lines)
        if pieces and isinstance(pieces[-1], Entry) and pieces[-1].row.type == sse.STREAM_END:
            self.done = True
        elif not pieces and self._subscription.ended and self.after == before:
            self.done = self.done or self._subscription.batch(self.after) == []
        return pieces

    @property
    def is_live(self) -> bool:
        """Whether what follows is told by the hub alone: no output is wanted, and the run is open there."""
        return not (self._output or self._unknown or self._subscription.tail is None)

    async def wait(self) -> None:
        """Return when reading is worth while again; see Subscription.wait for limits and cancellation."""
        if self._held or self._unknown:
            await trio.sleep(HELD if self._held else POLL)
            return
        await self._subscription.wait(self.after, self._line if self._output else None)

    async def _entries(self, pieces: list[Piece]) -> list[Entry]:
        """Return the events that follow; add a Reset to `pieces` when they are not those that were due."""
        tail = self._subscription.tail  # before the read: what is published meanwhile is not missing
        entries = self._subscription.batch(self.after, READ_BYTES)
        self._unknown = False
        self.off_ring = entries is None
        start = self.after + 1
        if entries is None:
            entries = await self._stored()
            if not entries:
                start = 1 + max(self.after, await self._closed_tail() if tail is None else tail)
                # The run may have ended between the two looks; then its last events are there now.
                entries = await self._stored() if tail is None and start > self.after + 1 else []
        if entries:
            start = entries[0].offset
            self.done = False
        if self._must_reset or start > self.after + 1:
            pieces.append(Reset(start, self._reason, self._run.epoch))
            self._subscription.count_reset(self._reason)
            self.after = start - 1
            self._must_reset, self._reason = False, "trimmed"
        return entries

    async def _stored(self) -> list[Entry]:
        rows = await self._store.events(self._run.no, self.after, READ_ROWS, READ_BYTES)
        return [Entry(row, self._run.epoch) for row in rows]

    async def _closed_tail(self) -> int:
        """Return the last offset of a run that the hub does not have open, and note what that means."""
        run = await self._store.run(self._run.id)
        if run is not None and not run.status.is_terminal:
            self._unknown = True
            return self.after
        self.done = True
        return 0 if run is None else run.tail

    async def _lines(self) -> list[OutputRow]:
        if self._line is None:
            self._line = await self._line_before(self.after)
        if not self._more_lines and (self._subscription.lines or 0) <= self._line:
            return []
        lines = await self._store.outputs(self._run.no, self._line, READ_ROWS)
        self._more_lines = len(lines) == READ_ROWS
        return lines

    async def _line_before(self, offset: int) -> int:
        """Return the number of the last line printed before event `offset`: lines are sorted by `after`."""
        low, high = 0, max(self._run.lines, self._subscription.lines or 0) if offset else 0
        while low < high:
            middle = (low + high) // 2
            found = await self._store.outputs(self._run.no, middle, 1)
            if found and found[0].after < offset:
                low = found[0].offset
            else:
                high = middle
        return low

    def _merge(self, entries: list[Entry], lines: list[OutputRow]) -> list[Piece]:
        """Put lines between events, each behind the event that was the newest when it was printed."""
        if self._more_lines and lines:
            # There are more lines, perhaps behind the same event: later events have to wait for them.
            entries = [entry for entry in entries if entry.offset <= lines[-1].after]
        pieces: list[Piece] = []
        rest = iter(lines)
        line = next(rest, None)
        for entry in entries:
            while line is not None and line.after < entry.offset:
                pieces.append(self._take(line))
                line = next(rest, None)
            pieces.append(entry)
            self.after = entry.offset
        while line is not None and line.after <= self.after:
            pieces.append(self._take(line))
            line = next(rest, None)
        self._held = line is not None and not pieces
        self._more_lines = self._more_lines or line is not None
        return pieces

    def _take(self, row: OutputRow) -> Line:
        self._line = row.offset
        return Line(row, self.after, self._run.epoch)


async def wait_for_end(store: Store, hub: Hub, run: RunRow, client: Client, seconds: float) -> RunRow:
    """Return the run as soon as it has ended, or as it is after `seconds`, or when the client leaves.

    Raises:
      StoreError: the disk does not answer.
    """
    deadline = trio.current_time() + seconds
    with hub.attach(run.no, run.epoch) as subscription:
        while True:
            run = await store.run(run.id) or run
            now = trio.current_time()
            over = run.status.is_terminal or subscription.ended or subscription.closing
            if over or client.gone or now >= deadline:
                return run
            # A run that the hub does not know yet cannot wake anybody: look again after a while.
            look = deadline if subscription.tail is not None else min(deadline, now + POLL)
            await client.wait(subscription.wait_end, look)


def is_over(run: RunRow, cursor: Cursor) -> bool:
    """Whether nothing can follow `cursor`: the run has finished, and the client has all of it."""
    if not (run.status.is_terminal and run.tail > 0 and cursor.is_of(run.epoch)):
        return False
    return cursor.resolve(run.tail) >= run.tail
