"""Writes what a run says straight to the sockets of everybody who has all of it so far.

Subscribers who are up to date all want the same bytes, so these are framed once and written without waiting, from one
loop: 9 µs per delivery, 7 to 8 of them the kernel's (`python -m tests.bench fanout`), where a send through ASGI,
hypercorn, h11 takes 60 to 100. Who rides has no task. Whoever does not take a whole write at once, and whoever has
something else to hear than events, goes on in a task of its own: the slow path, which waits for its client and nobody
else's.

Rule 1: a subscriber rides from the moment it has read everything until it falls behind; its position tells which bytes
it has, so nothing is written twice or left out wherever it changes over.

Rule 2: `stream.end` is never written here: how a response ends is its own task's business.

Rule 3: those who ride on a run are kept in groups, one for each position. A turn writes to some of the group that has
waited longest all that there is by then: the later a rider's turn, the more events its one write joins, and no run
waits for more than a turn of each other one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from gateway import sse

if TYPE_CHECKING:
    from gateway.fanout import Subscription

#: Subscribers written to before others have their turn in the loop: 2.3 ms at 9 µs each.
TURN: Final = 256

#: Bytes of data joined for one write.
JOINED: Final = 64 * 1024

#: Seconds of silence before a comment: below the 55 to 60 s after which common proxies close (nginx, ALB,
#: Heroku).
HEARTBEAT_SECONDS: Final = 15.0

#: Seconds between two looks for riders whose time is over: each goes through a whole group, 0.5 ms for 10,000.
LOOK: Final = 0.1


class Seat:
    """One subscriber, riding or about to.

    Args:
      number, subscription: of the run.
      after: offset of the newest event that it has.
      framed: whether the response is chunked.
      ends_at: when it goes on by itself at the latest (trio's clock).
      off: called when it has to go on by itself; by then it rides no longer. It must not wait or raise.

    Attributes:
      after: offset of the newest event that was written, or is in `rest`.
      rest: what of it the socket did not take; the owner writes it first.
      written_at: when something was written last, known when it does not ride.
      fd: of its socket while it rides, else -1.
    """

    __slots__ = ("after", "ends_at", "fd", "framed", "number", "off", "rest", "subscription", "written_at")

    def __init__(
        self,
        number: int,
        subscription: Subscription,
        after: int,
        *,
        framed: bool,
        ends_at: float,
        off: Callable[[], None],
    ) -> None:
        self.number = number
        self.subscription = subscription
        self.after = after
        self.framed = framed
        self.ends_at = ends_at
        self.off = off
        self.rest: memoryview | None = None
        self.written_at = trio.current_time()
        self.fd = -1


class _Group:
    """Riders at the same position.

    `written_at`: since when all of them have been written to, at least; `ends_at`: of the first whose time is over.
    """

    __slots__ = ("ends_at", "seats", "written_at")

    def __init__(self, written_at: float) -> None:
        self.seats: dict[Seat, None] = {}
        self.written_at = written_at
        self.ends_at = math.inf

    @property
    def due(self) -> float:
        """When it has to be looked at."""
        return min(self.written_at + HEARTBEAT_SECONDS, self.ends_at)


#: By (offset of the newest event that they have, whether they get it in chunks).
_Groups = dict[tuple[int, bool], _Group]


class Broadcast:
    """The riders of all runs, and the loop that writes to them. One task runs `run`.

    Args:
      enabled: FAST_PATH.

    Attributes:
      deliveries: writes that carried events to a subscriber.
      events: those that were carried.
      shortfalls: riders that did not take theirs at once.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.deliveries = 0
        self.events = 0
        self.shortfalls = 0
        self._riders: dict[int, _Groups] = {}
        self._news: dict[int, None] = {}
        self._wake = trio.Event()
        self._due = math.inf
        self._rest = trio.CancelScope()

    @property
    def riders(self) -> int:
        """How many ride now."""
        return sum(len(group.seats) for groups in self._riders.values() for group in groups.values())

    def board(self, seat: Seat, fd: int) -> None:
        """Write to `fd`, non-blocking, on behalf of a seat; nobody else may meanwhile. It may be off at once."""
        if not self.enabled:
            seat.off()
            return
        seat.fd = fd
        groups = self._riders.setdefault(seat.number, {})
        group = groups.get((seat.after, seat.framed))
        if group is None:
            group = groups[seat.after, seat.framed] = _Group(seat.written_at)
        group.seats[seat] = None
        group.ends_at = min(group.ends_at, seat.ends_at)
        if group.due < self._due:
            self._due = self._rest.deadline = group.due
        if seat.subscription.news(seat.after):
            self.news(seat.number)

    def leave(self, seat: Seat) -> None:
        """Let go of a seat's descriptor; nothing when it does not ride."""
        if seat.fd == -1:
            return
        seat.fd = -1
        groups = self._riders[seat.number]
        group = groups[seat.after, seat.framed]
        seat.written_at = max(seat.written_at, group.written_at)
        del group.seats[seat]
        if not group.seats:
            del groups[seat.after, seat.framed]
            if not groups:
                del self._riders[seat.number]

    def throw_off(self, seat: Seat) -> None:
        """Have a seat's owner go on; nothing when it does not ride."""
        if seat.fd != -1:
            self.leave(seat)
            seat.off()

    def news(self, number: int) -> None:
        """A run has said something that is committed. Never waits."""
        if number in self._riders:
            self._news[number] = None
            self._wake.set()

    def end(self) -> None:
        """The gateway shuts down: everybody goes on alone."""
        self.enabled = False
        for groups in list(self._riders.values()):
            for group in list(groups.values()):
                for seat in list(group.seats):
                    self.throw_off(seat)

    async def run(self) -> None:
        """Write until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tend)
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                budget = TURN
                while self._news:
                    number = next(iter(self._news))
                    del self._news[number]
                    if count := self._turn(number, budget):
                        self._news[number] = None  # behind the others, who have their turns first
                        budget -= count
                    if budget <= 0:
                        await trio.lowlevel.checkpoint()
                        budget = TURN

    # --- what runs say --------------------------------------------------------------------------------------

    def _turn(self, number: int, most: int) -> int:
        """Write what there is to `most` riders of a run, of those who have waited longest; return to how many."""
        groups = self._riders.get(number, {})
        for key, group in groups.items():
            first = next(iter(group.seats))
            if first.subscription.news(key[0]):
                break
        else:
            return 0
        seats = list(islice(group.seats, most))
        parcel = _parcel(first)
        if parcel is None:
            for seat in seats:
                self.throw_off(seat)
        else:
            self._write(groups, key, seats, *parcel)
        return len(seats)

    def _write(
        self, groups: _Groups, key: tuple[int, bool], seats: list[Seat], data: bytes, after: int
    ) -> None:
        """Write `data`, up to event `after`, to riders of one group, and move them to the group who have that."""
        write, size = os.write, len(data)
        short: list[tuple[Seat, int]] = []
        for seat in seats:
            try:
                taken = write(seat.fd, data)
            except (
                OSError
            ):  # full, and the owner reads it again; or gone, and the owner is about to hear of it
                taken = 0
            if taken != size:
                short.append((seat, taken))
        now = trio.current_time()
        left = groups[key]
        target = groups.get((after, key[1]))
        if target is None:
            target = groups[after, key[1]] = _Group(now)
        target.ends_at = min(target.ends_at, left.ends_at)
        target.seats.update(dict.fromkeys(seats))
        if len(left.seats) == len(seats):
            del groups[key]
        else:
            for seat in seats:
                del left.seats[seat]
        for seat in seats:
            seat.after = after
        self.deliveries += len(seats) - len(short)
        self.events += len(seats) * (after - key[0])
        if short:
            self._set_down(short, key[0], data)

    def _set_down(self, short: list[tuple[Seat, int]], before: int, data: bytes) -> None:
        """Have those go on by themselves who have taken only so many bytes."""
        self.shortfalls += len(short)
        for seat, taken in short:
            self.leave(seat)
            if taken:
                seat.rest = memoryview(data)[taken:]
            else:
                self.events -= seat.after - before
                seat.after = before
            seat.off()

    # --- what time brings -----------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Break the silence of those to whom nothing is said; have those go on whose time is over."""
        while True:
            with trio.CancelScope(deadline=self._due) as self._rest:
                await trio.sleep_forever()
            now = trio.current_time()
            self._due = now + HEARTBEAT_SECONDS  # for who boards meanwhile
            for groups in list(self._riders.values()):
                for key, group in list(groups.items()):
                    await self._look_after(key[1], group, now)
            due = (group.due for groups in self._riders.values() for group in groups.values())
            self._due = max(min(due, default=math.inf), trio.current_time() + LOOK)

    async def _look_after(self, framed: bool, group: _Group, now: float) -> None:
        if group.ends_at <= now:
            for seat in [seat for seat in group.seats if seat.ends_at <= now]:
                self.throw_off(seat)
            group.ends_at = min((seat.ends_at for seat in group.seats), default=math.inf)
        if group.written_at + HEARTBEAT_SECONDS > now:
            return
        group.written_at = now
        data = sse.chunk(sse.HEARTBEAT) if framed else sse.HEARTBEAT
        seats = list(group.seats)
        for start in range(0, len(seats), TURN):
            for seat in seats[start : start + TURN]:
                self._comfort(seat, data)
            await trio.lowlevel.checkpoint()

    def _comfort(self, seat: Seat, data: bytes) -> None:
        if seat.fd == -1:  # it has left meanwhile
            return
        try:
            taken = os.write(seat.fd, data)
        except OSError:
            taken = 0
        if taken != len(data):
            self.leave(seat)
            seat.rest = memoryview(data)[taken:] if taken else None
            seat.off()


def _parcel(seat: Seat) -> tuple[bytes, int] | None:
    """Return bytes for everybody at a seat's position, and the offset of their last event; None: go on alone."""
    entries = seat.subscription.batch(seat.after, JOINED)
    if entries and entries[-1].row.type == sse.STREAM_END:
        entries.pop()
    if not entries or entries[0].offset != seat.after + 1:
        return None  # not in the ring (any more), or nothing follows but the end
    data = b"".join([entry.sse for entry in entries])
    return sse.chunk(data) if seat.framed else data, entries[-1].offset
