"""The response that carries one run's stream to one subscriber.

A raw ASGI application: what it sends is joined bytes, and when it stops is its own decision, never a
cancellation inside a send (see gateway.leaving). Source of the headers: CONTRACT 2.3.
"""

from __future__ import annotations

import functools
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

import trio
from starlette.types import Receive, Scope, Send

from gateway import sse
from gateway.broadcast import HEARTBEAT_SECONDS as HEARTBEAT_SECONDS
from gateway.broadcast import Seat
from gateway.connection import Peer
from gateway.fanout import Hub, Subscription
from gateway.following import Follower, Piece
from gateway.lagging import READS, Lag, Pace, Portion
from gateway.leaving import Client, watched
from gateway.rendering import RENDER, type_of
from gateway.selection import wants
from gateway.sessions import Session
from gateway.sse import Cursor, Origin
from gateway.store.protocol import Store, StoreError
from gateway.store.rows import RunRow

logger = logging.getLogger(__name__)

#: Seconds a stream lives, less or more a fifth, so that streams opened together do not reconnect together.
#: Precedent: Mercure's 600 s, randomised.
LIFE_SECONDS: Final = 600.0

#: Most bytes in one send: what one write deadline has to suffice for.
CHUNK: Final = 64 * 1024

#: Seconds before a store that does not answer is asked again, with the stream held open: a native EventSource
#: would not come back from an error status.
STORE_PAUSE: Final = 1.0

HEADERS: Final = (
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"content-encoding", b"identity"),
    (b"x-content-type-options", b"nosniff"),
    (b"vary", b"Accept, Origin"),
)

#: What else a client that asks for events may hear (gateway.sessions).
BUSY: Final = "With too many open, events are `stream.busy` alone, and when to come back."

#: What a stream can be rendered as, the default first: `curl -N` says `*/*`.
RENDERINGS: Final = (sse.EVENT_STREAM, sse.JSON, sse.NDJSON, sse.PLAIN)


@dataclass(frozen=True, slots=True)
class _Rendering:
    content_type: bytes
    #: sent in silence; empty: nothing can be said without being taken for content
    heartbeat: bytes = b""
    #: whether the client's reconnection time, or its cursor alone, can be set
    controls: bool = False


_RENDERINGS: Final = {
    sse.EVENT_STREAM: _Rendering(b"text/event-stream; charset=utf-8", sse.HEARTBEAT, True),
    # An empty line is what parsers of ndjson may ignore, and CouchDB's feeds send in silence.
    sse.NDJSON: _Rendering(b"application/x-ndjson", b"\n"),
    sse.PLAIN: _Rendering(b"text/plain; charset=utf-8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a subscriber asked for, and for how long it may listen.

    Attributes:
      session: its place among the streams of its token.
      output: whether output lines are interleaved.
      types: types of the events that are wanted, `log` for output lines; None: all.
      life: seconds after which the stream ends to be opened again; None: no limit but the token's.
      expires_in: seconds until the token's `exp`.
    """

    rendering: str
    cursor: Cursor
    session: Session = field(default_factory=Session.of_nobody)
    output: bool = False
    types: frozenset[str] | None = None
    life: float | None = LIFE_SECONDS
    expires_in: float = float("inf")


_Piece = TypeVar("_Piece")
_Piece_co = TypeVar("_Piece_co", covariant=True)


#: What is next, and what to wait for when that is nothing.
_Read: TypeAlias = tuple[Sequence[_Piece], Callable[[], Any]]


class Source(Protocol[_Piece_co]):
    """What a stream is read from: a position that moves on (gateway.following, gateway.merging)."""

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""

    @property
    def closing(self) -> bool:
        """Whether the gateway shuts down."""

    @property
    def off_ring(self) -> bool:
        """Whether what was read last had left the ring."""

    @property
    def cursor(self) -> str:
        """The id that continues behind everything that was read."""

    async def read(self) -> Sequence[_Piece_co]:
        """Return what is next, and move behind it; empty: nothing now. Raises StoreError, and has not moved."""

    async def wait(self) -> None:
        """Return when reading is worth while again. The caller has a deadline."""


class EventStream(ABC, Generic[_Piece]):
    """One subscriber, as an ASGI application.

    Ends when its source is done, at the end of its life, when the token expires or is revoked, when the gateway shuts
    down (with a `retry:` that spreads the reconnects) and when the client leaves. A store that does not answer only
    delays it.

    Args:
      name: what it follows, for the log.
    """

    def __init__(self, hub: Hub, wish: Wish, name: str) -> None:
        self._hub = hub
        self._wish = wish
        self._name = name
        self._rendering = _RENDERINGS[wish.rendering]
        self._silent_since = 0.0
        self._pace = Pace()
        self._last: _Piece | None = None
        self._told = ""  # the cursor as the client has it
        self._peer: Peer | None = None
        self._ends_at = 0.0

    @abstractmethod
    def _open(self) -> AbstractContextManager[Source[_Piece]]:
        """Return the source; what it holds is let go of at the end."""

    @abstractmethod
    def _type_of(self, piece: _Piece) -> str:
        """Return the type of the event that a piece becomes."""

    @abstractmethod
    def _render(self, piece: _Piece | Lag) -> bytes:
        """Return the bytes of a piece."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream as the response to one request; the head only for HEAD.

        Raises:
          TooManyStreams: its token has as many open as it may; nothing was sent.
        """
        with ExitStack() as held:
            held.enter_context(self._wish.session)
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            if self._rendering.controls:
                # The first bytes leave before anything is read: they tell client and proxies that this works.
                greeting = sse.HEARTBEAT + sse.retry(random.randint(1000, 3000))
                await send({"type": "http.response.body", "body": greeting, "more_body": True})
            self._peer = scope.get("state", {}).get("peer")
            self._ends_at = self._end_of_life()
            self._silent_since = trio.current_time()
            source = held.enter_context(self._open())
            # Whoever began with what is new has no cursor yet, and would begin so again.
            self._told = source.cursor if self._wish.cursor.origin is Origin.AFTER else ""
            await self._speak(source, held, receive, send)

    async def _speak(self, source: Source[_Piece], held: ExitStack, receive: Receive, send: Send) -> None:
        """Send what there is until the stream ends, or is parked with what it holds."""
        first = await self._read(source)
        over = source.done or source.closing or self._wish.session.ended.is_set()
        if not (first[0] or over or trio.current_time() >= self._ends_at) and self._can_park(source):
            self._park(source, held.pop_all())  # the usual case, for which nobody need watch the client
            return
        async with watched(receive) as client:
            self._wish.session.on_end(client.dismiss)
            farewell = await self._follow(first, source, client, send)
        if farewell is None:
            self._park(source, held.pop_all())
        elif not client.gone:
            await send({"type": "http.response.body", "body": farewell})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"content-type", self._rendering.content_type), *HEADERS]

    def _end_of_life(self) -> float:
        life = float("inf") if self._wish.life is None else self._wish.life * random.uniform(0.8, 1.2)
        return trio.current_time() + max(0.0, min(life, self._wish.expires_in))

    async def _follow(
        self, first: _Read[_Piece], source: Source[_Piece], client: Client, send: Send
    ) -> bytes | None:
        """Send everything, behind what was read first, until the stream ends.

        Returns the bytes to end it with, or None: it is to be parked.
        """
        pieces, wait = first
        while True:
            await self._deliver(await self._shown(source, pieces), source, client, send)
            if client.gone or client.dismissed or source.done or trio.current_time() >= self._ends_at:
                return b""
            if source.closing:
                return sse.retry(random.randint(*self._hub.farewell)) if self._rendering.controls else b""
            if not pieces:
                if self._can_park(source):
                    return None
                until = min(self._ends_at, self._silent_since + HEARTBEAT_SECONDS)
                await self._wait(client, wait, until)
            # Also while there is something to read: it may all be filtered out.
            await self._break_silence(source, client, send)
            pieces, wait = await self._read(source)

    def _can_park(self, source: Source[_Piece]) -> bool:
        """Whether what comes next can be written by somebody else (gateway.broadcast)."""
        return False

    def _park(self, source: Source[_Piece], held: ExitStack) -> None:
        """Leave what comes next to somebody else; `held` is to be closed at the end."""
        raise NotImplementedError

    async def _read(self, source: Source[_Piece]) -> _Read[_Piece]:
        """Return what is next, and what to wait for when that is nothing."""
        try:
            pieces = await source.read()
        except StoreError as error:
            logger.warning("stream of %s waits for the store: %s", self._name, error)
            return [], _pause
        self._last = pieces[-1] if pieces else self._last
        return pieces, source.wait

    async def _wait(self, client: Client, wait: Callable[[], Any], deadline: float) -> None:
        if wait is _pause:
            await client.wait(wait, deadline)
            return
        self._pace.level(trio.current_time())
        await client.wait(wait, deadline)
        self._pace.level(trio.current_time())  # what it has not seen was published just now

    async def _shown(self, source: Source[_Piece], pieces: Sequence[_Piece]) -> Sequence[_Piece | Lag]:
        """Return what the client gets of what is next; of a client that is behind, of more than that."""
        wanted = self._wanted(pieces)
        if not pieces or not self._pace.behind(trio.current_time(), off_ring=source.off_ring):
            return wanted
        portion: Portion[_Piece] = Portion()
        portion.add(wanted)
        for _ in range(READS):
            if portion.size >= CHUNK or source.done:
                break
            pieces, _ = await self._read(source)
            if not pieces:
                break
            portion.add(self._wanted(pieces))
        told = portion.pieces()
        self._hub.tally.lags += sum(isinstance(piece, Lag) for piece in told)
        return told

    def _wanted(self, pieces: Sequence[_Piece]) -> Sequence[_Piece]:
        types = self._wish.types
        return pieces if types is None else [piece for piece in pieces if wants(types, self._type_of(piece))]

    async def _deliver(
        self, pieces: Sequence[_Piece | Lag], source: Source[_Piece], client: Client, send: Send
    ) -> None:
        self._hub.tally.delivered += len(pieces)
        body = b"".join([self._render(piece) for piece in pieces])
        for start in range(0, len(body), CHUNK):
            if client.gone or client.dismissed:
                return
            await send({"type": "http.response.body", "body": body[start : start + CHUNK], "more_body": True})
            self._silent_since = trio.current_time()
        if pieces and pieces[-1] is self._last:
            self._told = source.cursor

    async def _break_silence(self, source: Source[_Piece], client: Client, send: Send) -> None:
        if client.gone or trio.current_time() < self._silent_since + HEARTBEAT_SECONDS:
            return
        self._silent_since = trio.current_time()
        body = self._rendering.heartbeat
        if self._rendering.controls and self._told != source.cursor:
            # Events that it does not see have passed: it need not come back to them.
            self._told = source.cursor
            body += sse.id_block(self._told)
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


class RunStream(EventStream[Piece]):
    """One subscriber of one run; done after `stream.end`."""

    def __init__(self, store: Store, hub: Hub, run: RunRow, wish: Wish) -> None:
        super().__init__(hub, wish, f"run {run.id}")
        self._subscription: Subscription
        self._source: Follower
        self._held: ExitStack
        self._seat: Seat | None = None
        self._store = store
        self._run = run

    @contextmanager
    def _open(self) -> Iterator[Follower]:
        with self._hub.attach(self._run.no, self._run.epoch) as self._subscription:
            self._hub.remember(self._run)
            yield Follower(
                self._store, self._subscription, self._run, self._wish.cursor, output=self._wish.output
            )

    def _can_park(self, source: Source[Piece]) -> bool:
        """Whether the bytes are the same for everybody: then it rides as long as the client keeps up with them."""
        assert isinstance(source, Follower)
        wish = self._wish
        plain = wish.rendering == sse.EVENT_STREAM and not wish.output and wish.types is None
        return plain and self._peer is not None and source.is_live and self._hub.broadcast.enabled

    def _park(self, source: Source[Piece], held: ExitStack) -> None:
        assert self._peer is not None
        assert isinstance(source, Follower)
        self._source, self._held = source, held
        self._peer.park(self)

    @property
    def framed(self) -> bool:
        """Whether the response is chunked."""
        return self._peer is not None and self._peer.http_version != "1.0"

    def board(self, fd: int, wake: Callable[[], None]) -> None:
        """Ride, until something is to be said that is not for everybody."""
        self._seat = Seat(
            self._run.no,
            self._subscription,
            self._source.after,
            framed=self.framed,
            ends_at=self._ends_at,
            off=wake,
        )
        self._hub.broadcast.board(self._seat, fd)
        # Behind it, so that a token that was taken back on the way here is noticed.
        self._wish.session.on_end(functools.partial(self._hub.broadcast.throw_off, self._seat))

    async def resume(self, receive: Receive, send: Send) -> None:
        """Go on behind what was written to the seat."""
        seat, source = self._seat, self._source
        assert seat is not None
        assert self._peer is not None
        with self._held as held:
            source.after = seat.after
            self._told = source.cursor
            self._silent_since = max(self._silent_since, seat.written_at)
            if seat.rest is not None:
                await self._peer.write(seat.rest)
            self._pace.level(trio.current_time())
            await self._speak(source, held, receive, send)

    def abandon(self) -> None:
        """Let go of everything."""
        if self._seat is not None:
            self._hub.broadcast.leave(self._seat)
        self._held.close()

    def _type_of(self, piece: Piece) -> str:
        return type_of(piece)

    def _render(self, piece: Piece | Lag) -> bytes:
        return RENDER[self._wish.rendering](piece, self._run.id)


async def _pause() -> None:
    await trio.sleep(STORE_PAUSE)
