"""The response that carries one run's stream to one subscriber.

A raw ASGI application: what it sends is joined bytes, and when it stops is its own decision, never a
cancellation inside a send (see gateway.leaving). Source of the headers: CONTRACT 2.3.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from gateway import sse
from gateway.connection import Peer
from gateway.documents import EventPage
from gateway.fanout import Entry, Hub, Subscription
from gateway.following import Follower, Line, Piece
from gateway.leaving import Client, watched
from gateway.sessions import Session
from gateway.sse import Cursor
from gateway.store.protocol import Store, StoreError
from gateway.store.rows import RunRow

logger = logging.getLogger(__name__)

#: Seconds of silence before a comment: below the 55 to 60 s after which common proxies close (nginx, ALB,
#: Heroku).
HEARTBEAT_SECONDS: Final = 15.0

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


def _as_sse(piece: Piece, run: str) -> bytes:
    if isinstance(piece, Entry):
        return piece.sse
    if isinstance(piece, Line):
        return sse.event_bytes(piece.id, "log", piece.data(run))
    return sse.reset_event(piece.start, piece.reason, piece.epoch)


def _as_ndjson(piece: Piece, run: str) -> bytes:
    return sse.ndjson_line(*_parts(piece, run))


def _as_text(piece: Piece, run: str) -> bytes:
    if isinstance(piece, Entry):
        return sse.plain_text(piece.row.data)
    return sse.plain_line(piece.row.text) if isinstance(piece, Line) else b""


def _parts(piece: Piece, run: str) -> tuple[str, str, bytes]:
    """Return id, type and data of a piece."""
    if isinstance(piece, Entry):
        return piece.id, piece.row.type, piece.row.data
    if isinstance(piece, Line):
        return piece.id, "log", piece.data(run)
    return piece.id, "stream.reset", sse.reset_data(piece.start, piece.reason)


@dataclass(frozen=True, slots=True)
class _Rendering:
    content_type: bytes
    render: Callable[[Piece, str], bytes]
    #: sent in silence; empty: nothing can be said without being taken for content
    heartbeat: bytes = b""
    #: whether the client's reconnection time can be set
    retries: bool = False


_RENDERINGS: Final = {
    sse.EVENT_STREAM: _Rendering(b"text/event-stream; charset=utf-8", _as_sse, sse.HEARTBEAT, True),
    # An empty line is what parsers of ndjson may ignore, and CouchDB's feeds send in silence.
    sse.NDJSON: _Rendering(b"application/x-ndjson", _as_ndjson, b"\n"),
    sse.PLAIN: _Rendering(b"text/plain; charset=utf-8", _as_text),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a subscriber asked for, and for how long it may listen.

    Attributes:
      session: its place among the streams of its token.
      output: whether output lines are interleaved.
      life: seconds after which the stream ends to be opened again; None: no limit but the token's.
      expires_in: seconds until the token's `exp`.
    """

    rendering: str
    cursor: Cursor
    session: Session = field(default_factory=Session.of_nobody)
    output: bool = False
    life: float | None = LIFE_SECONDS
    expires_in: float = float("inf")


class RunStream:
    """One subscriber of one run, as an ASGI application.

    Ends after `stream.end`, at the end of its life, when the token expires or is revoked, when the gateway shuts
    down (with a `retry:` that spreads the reconnects) and when the client leaves. A store that does not answer only
    delays it.
    """

    def __init__(self, store: Store, hub: Hub, run: RunRow, wish: Wish) -> None:
        self._store = store
        self._hub = hub
        self._run = run
        self._wish = wish
        self._rendering = _RENDERINGS[wish.rendering]
        self._silent_since = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream as the response to one request; the head only for HEAD.

        Raises:
          TooManyStreams: its token has as many open as it may; nothing was sent.
        """
        with self._wish.session as session:
            await self._serve(session, scope, receive, send)

    async def _serve(self, session: Session, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        if self._rendering.retries:
            # The first bytes leave before anything is read: they tell client and proxies that this works.
            greeting = sse.HEARTBEAT + sse.retry(random.randint(1000, 3000))
            await send({"type": "http.response.body", "body": greeting, "more_body": True})
        async with watched(receive) as client:
            session.on_end(client.dismiss)
            farewell = await self._follow(client, send, self._outlet(scope))
        if not client.gone:
            await send({"type": "http.response.body", "body": farewell})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"content-type", self._rendering.content_type), *HEADERS]

    def _ends_at(self) -> float:
        life = float("inf") if self._wish.life is None else self._wish.life * random.uniform(0.8, 1.2)
        return trio.current_time() + max(0.0, min(life, self._wish.expires_in))

    async def _follow(self, client: Client, send: Send, peer: Peer | None) -> bytes:
        """Send everything until the stream ends; return the bytes to end it with."""
        ends_at = self._ends_at()
        self._silent_since = trio.current_time()
        with self._hub.attach(self._run.no, self._run.epoch) as subscription:
            follower = Follower(
                self._store, subscription, self._run, self._wish.cursor, output=self._wish.output
            )
            while True:
                pieces, wait = await self._read(follower)
                await self._deliver(pieces, client, send)
                if client.gone or client.dismissed or follower.done or trio.current_time() >= ends_at:
                    return b""
                if subscription.closing:
                    return sse.retry(random.randint(*self._hub.farewell)) if self._rendering.retries else b""
                if not pieces:
                    until = min(ends_at, self._silent_since + HEARTBEAT_SECONDS)
                    if peer is not None and follower.is_live:
                        await self._ride(peer, subscription, follower, client, until)
                    else:
                        await client.wait(wait, until)
                    await self._break_silence(client, send)

    def _outlet(self, scope: Scope) -> Peer | None:
        """Return the socket of a response whose bytes are the same for everybody; None: each goes its own way."""
        if self._wish.rendering != sse.EVENT_STREAM or self._wish.output or not self._hub.broadcast.enabled:
            return None
        peer: Peer | None = scope.get("state", {}).get("peer")
        return peer

    async def _ride(
        self, peer: Peer, subscription: Subscription, follower: Follower, client: Client, until: float
    ) -> None:
        """Have what comes next written by the broadcast, for as long as the client keeps up."""
        with self._hub.broadcast.seat(self._run.no, subscription, follower.after, peer) as seat:
            await client.wait(seat.ride, until)
        follower.after = seat.after
        self._silent_since = max(self._silent_since, seat.written_at)
        if seat.rest is not None and not client.gone:
            await peer.write(seat.rest)

    async def _read(self, follower: Follower) -> tuple[list[Piece], Callable[[], Any]]:
        """Return what is next, and what to wait for when that is nothing."""
        try:
            return await follower.read(), follower.wait
        except StoreError as error:
            logger.warning("stream of run %s waits for the store: %s", self._run.id, error)
            return [], _pause

    async def _deliver(self, pieces: Sequence[Piece], client: Client, send: Send) -> None:
        self._hub.tally.delivered += len(pieces)
        body = b"".join([self._rendering.render(piece, self._run.id) for piece in pieces])
        for start in range(0, len(body), CHUNK):
            if client.gone or client.dismissed:
                return
            await send({"type": "http.response.body", "body": body[start : start + CHUNK], "more_body": True})
            self._silent_since = trio.current_time()

    async def _break_silence(self, client: Client, send: Send) -> None:
        if client.gone or trio.current_time() < self._silent_since + HEARTBEAT_SECONDS:
            return
        self._silent_since = trio.current_time()
        if self._rendering.heartbeat:
            await send({"type": "http.response.body", "body": self._rendering.heartbeat, "more_body": True})


async def _pause() -> None:
    await trio.sleep(STORE_PAUSE)


async def read_page(
    store: Store,
    hub: Hub,
    run: RunRow,
    cursor: Cursor,
    client: Client,
    *,
    output: bool,
    limit: int,
    wait: float,
) -> EventPage:
    """Return a page of a stream.

    Waits up to `wait` seconds for the first event. At most `limit` events and 64 KiB of data, unless the
    first alone exceeds that. `next` is the cursor of the page that follows; `ended`: none will.

    Raises:
      StoreError: the disk does not answer.
    """
    deadline = trio.current_time() + wait
    with hub.attach(run.no, run.epoch) as subscription:
        follower = Follower(store, subscription, run, cursor, output=output)
        start = follower.after
        pieces = await follower.read()
        while not (pieces or follower.done or client.gone or subscription.closing):
            if trio.current_time() >= deadline:
                break
            await client.wait(follower.wait, deadline)
            pieces = await follower.read()
    parts = [_parts(piece, run.id) for piece in pieces[:limit]]
    hub.tally.delivered += len(parts)
    return {
        "events": [
            {"id": id, "type": type, "data": msgspec.Raw(data or b"null")} for id, type, data in parts
        ],
        "next": parts[-1][0] if parts else sse.event_id(run.epoch, start),
        "ended": follower.done and len(pieces) <= limit,
    }


def is_over(run: RunRow, cursor: Cursor) -> bool:
    """Whether nothing can follow `cursor`: the run has finished, and the client has all of it."""
    if not (run.status.is_terminal and run.tail > 0 and cursor.is_of(run.epoch)):
        return False
    return cursor.resolve(run.tail) >= run.tail
