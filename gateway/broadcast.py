"""Writes what a run says straight to the sockets of everybody who has all of it so far.

Subscribers who are up to date all want the same bytes, so these are framed once and written without waiting, from one
loop: 11 µs of the gateway's CPU per delivery, all of its work included (`python -m tests.bench crowd`, 1,000
subscribers), where a send through ASGI, hypercorn, h11 takes 60 to 100. Whoever does not take a whole write at once,
and whatever is no plain event, goes back to the subscriber's own task: the slow path, which waits for its client and
nobody else's.

Rule 1: a subscriber rides from the moment it has read everything until it falls behind; its position tells which bytes
it has, so nothing is written twice or left out wherever it changes over.

Rule 2: `stream.end` is never written here: how a response ends is its own task's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

import trio

from gateway import sse

if TYPE_CHECKING:
    from gateway.fanout import Subscription

#: Subscribers written to before others have their turn in the loop: 3 ms at 11 µs each.
TURN: Final = 256

#: Bytes of data joined for one write.
JOINED: Final = 64 * 1024


class Outlet(Protocol):
    """Where a response goes, below ASGI."""

    @property
    def http_version(self) -> str: ...

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 when it is closed."""


class Seat:
    """One subscriber on its ride; a context manager, made by Broadcast.seat. Nobody else may write meanwhile.

    Attributes:
      after: offset of the newest event that was written, or is in `rest`.
      rest: what of it the socket did not take; the owner writes it first.
      written_at: when something was written last (trio's clock).
    """

    __slots__ = (
        "_broadcast",
        "_number",
        "_off",
        "_outlet",
        "after",
        "framed",
        "rest",
        "subscription",
        "written_at",
    )

    def __init__(
        self, broadcast: Broadcast, number: int, subscription: Subscription, after: int, outlet: Outlet
    ) -> None:
        self._broadcast = broadcast
        self._number = number
        self._outlet = outlet
        self._off = trio.lowlevel.ParkingLot()
        self.subscription = subscription
        self.after = after
        self.framed = outlet.http_version != "1.0"
        self.rest: memoryview | None = None
        self.written_at = trio.current_time()

    def __enter__(self) -> Self:
        self._broadcast._board(self._number, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broadcast._leave(self._number, self)

    async def ride(self) -> None:
        """Return when the subscriber has to go on by itself; the caller has a deadline. Cancelling is harmless."""
        if self._broadcast._rides(self._number, self):
            await self._off.park()
        else:
            await trio.lowlevel.checkpoint()

    def write(self, data: bytes, after: int, now: float) -> bool:
        """Write `data`, which ends with event `after`; return whether the socket took all of it."""
        try:
            taken = os.write(self._outlet.fileno(), data)
        except BlockingIOError:
            return False  # nothing of it: the owner reads it again
        except OSError:  # the client is gone, and its owner is about to hear of it
            return False
        self.after = after
        self.written_at = now
        if taken == len(data):
            return True
        self.rest = memoryview(data)[taken:]
        return False

    def throw_off(self) -> None:
        """Wake the owner."""
        self._off.unpark_all()


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
        self._riders: dict[int, dict[Seat, None]] = {}
        self._news: dict[int, None] = {}
        self._wake = trio.Event()

    @property
    def riders(self) -> int:
        """How many ride now."""
        return sum(map(len, self._riders.values()))

    def seat(self, number: int, subscription: Subscription, after: int, outlet: Outlet) -> Seat:
        """Return a seat for a subscriber of run `number` who has everything up to offset `after`."""
        return Seat(self, number, subscription, after, outlet)

    def news(self, number: int) -> None:
        """A run has said something that is committed. Never waits."""
        if number in self._riders:
            self._news[number] = None
            self._wake.set()

    def end(self) -> None:
        """The gateway shuts down: everybody goes on alone."""
        self.enabled = False
        for riders in self._riders.values():
            self._throw_off(riders)
        self._riders.clear()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._news:
                number = next(iter(self._news))
                del self._news[number]
                await self._deliver(number)

    async def _deliver(self, number: int) -> None:
        """Bring everybody who rides on a run up to date, as far as one write each goes."""
        now = trio.current_time()
        parcels = _Parcels()
        riders = list(self._riders.get(number, ()))
        for start in range(0, len(riders), TURN):
            aboard = self._riders.get(number, {})
            off = [
                seat
                for seat in riders[start : start + TURN]
                if seat in aboard and not self._write(seat, parcels, now)
            ]
            for seat in off:
                del aboard[seat]
            self._throw_off(off)
            await trio.lowlevel.checkpoint()
        if parcels.more:
            self.news(number)

    def _write(self, seat: Seat, parcels: _Parcels, now: float) -> bool:
        """Write what the seat has not had; return whether it rides on."""
        parcel = parcels.get(seat)
        if parcel is None:
            return False
        data, after = parcel
        if not data:
            return True
        before = seat.after
        whole = seat.write(data, after, now)
        self.events += seat.after - before
        if whole:
            self.deliveries += 1
            return True
        self.shortfalls += 1
        return False

    @staticmethod
    def _throw_off(seats: Iterable[Seat]) -> None:
        for seat in seats:
            seat.throw_off()

    # --- a seat's own doors ----------------------------------------------------------------------------------

    def _board(self, number: int, seat: Seat) -> None:
        if self.enabled:
            self._riders.setdefault(number, {})[seat] = None
            if seat.subscription.news(seat.after):
                self.news(number)

    def _rides(self, number: int, seat: Seat) -> bool:
        return seat in self._riders.get(number, ())

    def _leave(self, number: int, seat: Seat) -> None:
        riders = self._riders.get(number, {})
        riders.pop(seat, None)
        if not riders:
            self._riders.pop(number, None)


class _Parcels:
    """What one look at a run found, framed once for all seats at the same position.

    A parcel is (bytes, offset of their last event); no bytes: nothing new; None: the owner has to go on alone.
    """

    def __init__(self) -> None:
        self.more = False
        self._made: dict[tuple[int, bool], tuple[bytes, int] | None] = {}

    def get(self, seat: Seat) -> tuple[bytes, int] | None:
        """Return what this seat gets."""
        key = seat.after, seat.framed
        if key not in self._made:
            self._made[key] = self._make(seat)
        return self._made[key]

    def _make(self, seat: Seat) -> tuple[bytes, int] | None:
        entries = seat.subscription.batch(seat.after, JOINED)
        if entries is None:  # not in the ring (any more)
            return None
        if not entries:
            over = seat.subscription.ended or seat.subscription.closing
            return None if over else (b"", seat.after)
        if entries[-1].row.type == sse.STREAM_END:
            entries.pop()
        if not entries or entries[0].offset != seat.after + 1:
            return None
        self.more = self.more or seat.subscription.news(entries[-1].offset)
        data = b"".join([entry.sse for entry in entries])
        return sse.chunk(data) if seat.framed else data, entries[-1].offset
