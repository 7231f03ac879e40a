"""One HTTP/1 connection over hypercorn's protocol classes, every wait bounded.

hypercorn 0.18 parses requests and keeps ASGI's order of messages (`H11Protocol`, `HTTPStream`); the socket,
the tasks and the timers around them are ours, because its own `TCPServer` for trio

- shields writes without an end, so that a client that does not read can hold a task and a shutdown for ever;
- stops reading while a pipelined request waits, and so never notices that its client is gone;
- loses the connection when an application is cancelled inside its final send;
- blocks an application for good that answers before it has read the body (its own queue of 10 parts is full).

Rules that follow: no checkpoint lies between the last byte of an answer and the reuse or the end of its
connection; a write ends within `ServeLimits.write_seconds` of its last progress; end of file on the socket
is the end of its client (a half-closed client gets its answer only if the application does not look for a
disconnect).
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, ConnectionState, Scope, TaskGroup
from hypercorn.utils import parse_socket_addr
from starlette.types import ASGIApp, Message

from gateway import upgrade
from gateway.http1 import Http1
from gateway.inbox import Inbox
from taskkit import linux

logger = logging.getLogger(__name__)

#: Bytes to read at once, and to read ahead while a pipelined request waits for its turn.
RECEIVE: Final = 64 * 1024

#: Bytes parsed at a time.
PIECE: Final = 4 * 1024

#: Seconds to go on reading after an answer that came before the end of its request. A socket closed with
#: unread bytes in it sends RST, which can overtake the answer (RFC 9112 §9.6). nginx's lingering_timeout is
#: 5 s, for browsers on slow lines; a client that sends more than that fits to read on its own time.
LINGER: Final = 2.0

#: Seconds that a connection has at a shutdown to bring its first request. Browsers open some in advance, which never
#: bring one: they hold the shutdown up by as much.
DRAIN_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """Bounds of the server; sizes in bytes, times in seconds.

    Attributes:
      connections: at once; what comes beyond gets 503. Also never more than three quarters of
        RLIMIT_NOFILE, so that the store and the runners' pipes keep descriptors to work with.
      write_seconds: a write that makes no progress for so long ends its connection with RST.
      accepts_per_second: new connections; more wait in the backlog. A second's worth may come at once.
      headers_seconds: for a request's head to arrive complete, on a new connection or after an answer.
        Longer than hypercorn's 5, so that a client polling every 10 s keeps its connection.
      body_seconds: between two pieces of a request's body, while the application waits for them.
      header_bytes: of a request's head; more is answered 431.
      message_bytes: of a WebSocket message from a client; more ends its connection with 1009.
      send_buffer: SO_SNDBUF of a connection. The kernel doubles it, and it bounds what a client that does not
        read can make us hold; 128 KiB fill 10 Mbit/s at 100 ms round trip.

    The backlog is that of whoever listens: pass sockets with `listen(1024)` or more. hypercorn's 100
    overflows when all clients of a gateway come back at once (650 to 800 are accepted per second and core).
    """

    connections: int = 10_000
    accepts_per_second: int = 200
    write_seconds: float = 10.0
    headers_seconds: float = 15.0
    body_seconds: float = 30.0
    header_bytes: int = 16 * 1024
    message_bytes: int = 64 * 1024
    send_buffer: int = 128 * 1024


class Peer:
    """The client of one request below ASGI; the application finds it in `scope["state"]["peer"]`.

    Attributes:
      client: address and port, or None on a Unix socket.
      http_version: "1.0" (answers are not chunked) or "1.1".
    """

    __slots__ = ("_socket", "_write", "client", "http_version")

    def __init__(
        self,
        sock: trio.socket.SocketType,
        client: tuple[str, int] | None,
        http_version: str,
        write: Callable[[bytes | memoryview], Awaitable[None]],
    ) -> None:
        self._socket = sock
        self._write = write
        self.client = client
        self.http_version = http_version

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 when the connection is over."""
        return self._socket.fileno()

    async def write(self, data: bytes | memoryview) -> None:
        """Write bytes of the response as they are, behind what was sent so far; for who frames them himself.

        Ends like every write within `ServeLimits.write_seconds` of its last progress, then with a reset. Cancelling
        waits for it.
        """
        await self._write(data)

    def abort(self) -> None:
        """End the connection at once with RST; unsent bytes are dropped. Again and again does nothing."""
        reset(self._socket)


def reset(sock: trio.socket.SocketType) -> None:
    """Close `sock` with RST instead of FIN; tasks that wait on it get trio.ClosedResourceError."""
    with contextlib.suppress(OSError):
        # l_onoff=1, l_linger=0: unsent data is thrown away, nothing waits for the peer (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Connection:
    """One accepted socket: reads, feeds the protocol, runs the application, writes.

    Args:
      app: called once per request; what it raises is logged and ends the connection.
      sock: connected; owned from here on.
      context: its `terminated` tells that connections are not to be kept alive any more.
      state: goes into every request's `scope["state"]`, beside `peer`.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: trio.socket.SocketType,
        config: Config,
        context: WorkerContext,
        limits: ServeLimits,
        state: Mapping[str, Any],
    ) -> None:
        self._app = app
        self._socket = sock
        self._config = config
        self._context = context
        self._limits = limits
        self._state = state
        self._ahead = bytearray()
        self._idle = True
        self._is_fresh = True
        self._broken = False
        self._closed = False
        self._reading = trio.CancelScope(deadline=trio.current_time() + limits.headers_seconds)
        self._writing = trio.Lock()
        self._client: tuple[str, int] | None = None

    async def run(self) -> None:
        """Serve requests until the client or the server ends the connection; close the socket."""
        try:
            try:
                self._client = parse_socket_addr(self._socket.family, self._socket.getpeername())
                server = parse_socket_addr(self._socket.family, self._socket.getsockname())
            except OSError:
                return  # reset while it waited in the backlog
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._protocol = self._new_protocol(server)
                await self._read()
                if self._protocol.upgrading is not None and not self._reading.cancel_called:
                    await self._serve_websocket(self._protocol.upgrading, server)
                await self._protocol.handle(Closed())
            await self._linger()
        finally:
            self._socket.close()

    def drain(self) -> None:
        """End the connection now if no request is under way; otherwise it ends after its answer.

        A request that is on its way already is answered, too: a connection that was accepted a moment ago has
        DRAIN_SECONDS to send it, another one that time to have it read. Closing would reset them.
        """
        if not self._idle:
            return
        if self._is_fresh or self._has_unread_bytes():
            self._reading.deadline = min(self._reading.deadline, trio.current_time() + DRAIN_SECONDS)
        else:
            self._reading.cancel()

    def _has_unread_bytes(self) -> bool:
        return self._socket.fileno() != -1 and linux.bytes_to_read(self._socket.fileno()) > 0

    def abort(self) -> None:
        """End the connection with RST, whatever is under way."""
        self._broken = True
        self._reading.cancel()
        reset(self._socket)

    def _new_protocol(self, server: tuple[str, int] | None) -> Http1:
        return Http1(
            cast("Any", self._app),  # only handed back to spawn_app
            self._config,
            self._context,
            cast("TaskGroup", self),  # HTTPStream calls nothing of it but spawn_app
            ConnectionState(dict(self._state)),
            False,
            self._client,
            server,
            self._send,
        )

    # -- in ------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Feed the protocol until end of file, the end of our side, or a deadline for reading."""
        with self._reading, contextlib.suppress(OSError, trio.ClosedResourceError):
            while data := await self._socket.recv(RECEIVE):
                self._is_fresh = False
                self._ahead += data
                while self._ahead:
                    await self._feed(self._next_piece())
                    if self._protocol.upgrading is not None:
                        self._ahead[:0] = self._protocol.unparsed
                        return

    def _next_piece(self) -> bytes:
        """Take a small piece: 64 KiB of one-byte chunks keep the parser, and so everybody, busy for 150 ms."""
        piece = bytes(self._ahead[:PIECE])
        del self._ahead[:PIECE]
        return piece

    async def _feed(self, data: bytes) -> None:
        """Hand `data` to the protocol; while it cannot take them, read ahead to notice a disconnect.

        It cannot when a pipelined request waits for the answer to the one before, and when the application
        does not take the body.
        """
        if not self._idle:
            self._reading.deadline = math.inf  # the client has done its part
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_ahead)
            await self._protocol.handle(RawData(data))
            nursery.cancel_scope.cancel()
        if not self._idle and self._protocol.awaits_body:
            self._reading.deadline = trio.current_time() + self._limits.body_seconds

    async def _read_ahead(self) -> None:
        with contextlib.suppress(OSError, trio.ClosedResourceError):
            while len(self._ahead) < RECEIVE:
                data = await self._socket.recv(RECEIVE - len(self._ahead))
                if not data:
                    break
                self._ahead += data
            else:
                return  # enough: from here on only a failing write can tell that the client is gone
        self._reading.cancel()

    async def _linger(self) -> None:
        """After our end of file, wait for the client's, if it has sent more than was read, or may have."""
        unread = self._protocol.has_unread_request or self._ahead or self._protocol.upgrading
        if self._broken or not (self._closed and unread):
            return
        with trio.move_on_after(LINGER), contextlib.suppress(OSError, trio.ClosedResourceError):
            while await self._socket.recv(RECEIVE):
                pass

    # -- the application -----------------------------------------------------------------------------------

    async def spawn_app(
        self,
        app: object,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Start the application for one request; return what takes its events. hypercorn calls this."""
        inbox = Inbox()
        assert scope["type"] == "http"
        scope["state"]["peer"] = Peer(self._socket, self._client, scope["http_version"], self.write)
        self._nursery.start_soon(self._perform, scope, inbox, send)

        async def put(event: ASGIReceiveEvent) -> None:
            if event["type"] == "http.disconnect":
                inbox.disconnect(cast("Message", event))
            else:
                await inbox.put(cast("Message", event))

        return put

    async def _perform(
        self, scope: Any, inbox: Inbox, send: Callable[[ASGISendEvent | None], Awaitable[None]]
    ) -> None:
        try:
            await self._app(scope, inbox.receive, cast("Any", send))
        except Exception:
            # The path without its query, which may hold a ticket.
            logger.exception("the application failed in %s %s", scope["method"], scope["path"])
        except BaseException:
            # Cancelled, alone or in a group. hypercorn would end the answer with a 500, for which an EventSource gives
            # up for ever; after a reset it comes back.
            self.abort()
            raise
        finally:
            inbox.finish()
            await send(None)

    async def _serve_websocket(self, request: h11.Request, server: tuple[str, int] | None) -> None:
        """Serve what is a WebSocket from here on, if the application accepts it."""
        self._reading = trio.CancelScope()
        peer = Peer(self._socket, self._client, "1.1", self.write)
        session = upgrade.Session(
            self._app,
            request,
            upgrade.scope_of(
                request,
                client=self._client,
                server=server,
                root_path=self._config.root_path,
                state={**self._state, "peer": peer},
            ),
            http=cast("h11.Connection", self._protocol.connection),
            line=self,
            reading=self._reading,
            headers=self._config.response_headers("h11"),
            message_bytes=self._limits.message_bytes,
        )
        self._nursery.start_soon(session.perform)
        with self._reading:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_ahead)  # notices a client that does not wait for the answer
                await session.answered.wait()
                nursery.cancel_scope.cancel()
            if session.accepted:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(session.keep_alive)
                    await session.listen(self._next_frames)
                    nursery.cancel_scope.cancel()
        session.end()
        await self._send(Closed())

    async def _next_frames(self) -> bytes:
        if self._ahead:
            await trio.lowlevel.checkpoint()
            return self._next_piece()
        return await self._socket.recv(PIECE)

    # -- out -----------------------------------------------------------------------------------------------

    async def _send(self, event: Event) -> None:
        """Do what the protocol wants: write, close, or arm the idle timer. Only a write has a checkpoint."""
        if isinstance(event, RawData):
            await self.write(event.data)
        elif isinstance(event, Closed):
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._reading.cancel()
        elif isinstance(event, Updated):
            self._idle = event.idle
            wait = self._limits.headers_seconds if event.idle else math.inf
            self._reading.deadline = trio.current_time() + wait

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, or give the connection up.

        Shielded, since half a chunk would spoil the stream, and h11 believes already that these bytes are
        out; bounded, since the peer decides how long a write takes.
        """
        if self._broken:
            await trio.lowlevel.checkpoint()  # an application that only sends must not spin
            return
        with trio.CancelScope(shield=True) as scope:
            async with self._writing:
                await self._write_pieces(memoryview(data), scope)
        if scope.cancelled_caught:
            logger.info("%s did not read for %g s: reset", self._client, self._limits.write_seconds)
            self.abort()

    async def _write_pieces(self, rest: memoryview, scope: trio.CancelScope) -> None:
        while rest and not self._broken:
            scope.deadline = trio.current_time() + self._limits.write_seconds
            try:
                rest = rest[await self._socket.send(rest) :]
            except (OSError, trio.ClosedResourceError):
                self._broken = True
                self._reading.cancel()
