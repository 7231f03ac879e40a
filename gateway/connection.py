"""One HTTP/1 connection over hypercorn's protocol classes, every wait bounded.

hypercorn 0.18 parses requests and keeps ASGI's order of messages (`H11Protocol`, `HTTPStream`); the socket,
the tasks and the timers around them are ours, because its own `TCPServer` for trio

- shields writes without an end, so that a client that does not read can hold a task and a shutdown for ever;
- stops reading while a pipelined request waits, and so never notices that its client is gone;
- loses the connection when an application is cancelled inside its final send;
- blocks an application for good that answers before it has read the body (its own queue of 10 parts is full);
- speaks HTTP/2 on plain text ports whenever asked, with no back-pressure and five ways to crash it.

Rules that follow: no checkpoint lies between the last byte of an answer and the reuse or the end of its
connection; a write ends within `ServeLimits.write_seconds` of its last progress; end of file on the socket
is the end of its client (a half-closed client gets its answer only if the application does not look for a
disconnect).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, ConnectionState, Scope, TaskGroup
from hypercorn.utils import parse_socket_addr
from starlette.types import ASGIApp, Message

from gateway import problems
from taskkit import linux

logger = logging.getLogger(__name__)

#: Bytes to read at once, and to read ahead while a pipelined request waits for its turn.
RECEIVE: Final = 64 * 1024

#: Bytes parsed at a time.
PIECE: Final = 4 * 1024

#: Parts of a request's body that wait for the application: 8 of at most RECEIVE bytes are half a megabyte.
INBOX: Final = 8

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
      keep_alive_seconds: for a request's head to arrive complete, on a new connection or after an answer.
        Longer than hypercorn's 5, so that a client polling every 10 s keeps its connection.
      body_seconds: between two pieces of a request's body, while the application waits for them.
      header_bytes: of a request's head; more is answered 431.
      send_buffer: SO_SNDBUF of a connection. The kernel doubles it, and it bounds what a client that does not
        read can make us hold; 128 KiB fill 10 Mbit/s at 100 ms round trip.

    The backlog is that of whoever listens: pass sockets with `listen(1024)` or more. hypercorn's 100
    overflows when all clients of a gateway come back at once (650 to 800 are accepted per second and core).
    """

    connections: int = 10_000
    write_seconds: float = 10.0
    keep_alive_seconds: float = 15.0
    body_seconds: float = 30.0
    header_bytes: int = 16 * 1024
    send_buffer: int = 128 * 1024


class Peer:
    """The client of one request below ASGI; the application finds it in `scope["state"]["peer"]`.

    Attributes:
      client: address and port, or None on a Unix socket.
      http_version: "1.0" (answers are not chunked) or "1.1".
    """

    __slots__ = ("_socket", "client", "http_version")

    def __init__(
        self, sock: trio.socket.SocketType, client: tuple[str, int] | None, http_version: str
    ) -> None:
        self._socket = sock
        self.client = client
        self.http_version = http_version

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 when the connection is over."""
        return self._socket.fileno()

    def abort(self) -> None:
        """End the connection at once with RST; unsent bytes are dropped. Again and again does nothing."""
        reset(self._socket)


def reset(sock: trio.socket.SocketType) -> None:
    """Close `sock` with RST instead of FIN; tasks that wait on it get trio.ClosedResourceError."""
    with contextlib.suppress(OSError):
        # l_onoff=1, l_linger=0: unsent data is thrown away, nothing waits for the peer (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class _Inbox:
    """What the application of one request receives: bounded, but a disconnect always fits.

    hypercorn's memory channel takes the disconnect as its 11th message and so blocks the sender, which may
    be the application itself inside its own final send.
    """

    def __init__(self) -> None:
        self._parts: deque[ASGIReceiveEvent] = deque()
        self._disconnected: ASGIReceiveEvent | None = None
        self._finished = False
        self._changed = trio.lowlevel.ParkingLot()

    async def put(self, event: ASGIReceiveEvent) -> None:
        """Add `event`; wait while the inbox is full, unless the application is through."""
        if event["type"] == "http.disconnect":
            self._disconnected = event
        else:
            while len(self._parts) >= INBOX and not self._finished:
                await self._changed.park()
            if not self._finished:
                self._parts.append(event)
        self._changed.unpark_all()

    async def receive(self) -> Message:
        """Return the next part; after the last one wait for the disconnect, then return that for ever."""
        if self._parts or self._disconnected is not None:
            # What is there is handed out even under a cancelled scope: Starlette's `is_disconnected` asks so.
            await trio.lowlevel.cancel_shielded_checkpoint()
        while not self._parts and self._disconnected is None:
            await self._changed.park()
        if not self._parts:
            return cast("Message", self._disconnected)
        part = self._parts.popleft()
        self._changed.unpark_all()
        return cast("Message", part)

    def finish(self) -> None:
        """Take nothing more: the application has returned."""
        self._finished = True
        self._parts.clear()
        self._changed.unpark_all()


class _Http1(H11Protocol):
    """hypercorn's HTTP/1 without the doors to HTTP/2 and WebSocket, with problem documents for errors."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Switch to nothing: hypercorn would go over to HTTP/2 here (`Upgrade: h2c`, `PRI * HTTP/2.0`)."""

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version not in (b"1.0", b"1.1"):
            await self._refuse(505)
            return
        if _head_size(request) > self.config.h11_max_incomplete_size:
            # h11 applies its limit to what is incomplete only: a head that comes in one piece passes.
            await self._refuse(431)
            return
        if _is_ambiguous(request):
            await self._refuse(400, "ambiguous-length")
            return
        if any(name == b"upgrade" for name, _ in request.headers):
            # A server may ignore an upgrade (RFC 9110 §7.8); the application answers the plain request. So no
            # byte reaches hypercorn's WSStream, which an early frame or a header that is not ASCII crashes.
            request = h11.Request(
                method=request.method,
                target=request.target,
                headers=[(name, value) for name, value in request.headers if name != b"upgrade"],
                http_version=request.http_version,
            )
        await super()._create_stream(request)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application says.

        An answer that comes before the end of its request is the last on this connection: it says so, or a client that
        keeps connections would send its next request into the end of this one.
        """
        if (
            isinstance(event, Response)
            and self.awaits_body
            and (b"connection", b"close") not in event.headers
        ):
            event = dataclasses.replace(event, headers=[*event.headers, (b"connection", b"close")])
        await super().stream_send(event)

    async def _refuse(self, status_code: int, code: str | None = None) -> None:
        await self._send_error_response(status_code, code)
        await self.send(Closed())

    async def _send_error_response(self, status_code: int, code: str | None = None) -> None:
        code = code or problems.code_of(status_code)
        body = problems.document(status_code, code, "the request does not follow HTTP/1.1, or not our limits")
        headers = [
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *self.config.response_headers("h11"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

    @property
    def has_unread_request(self) -> bool:
        """Whether the client was not through with its request when the answer was."""
        return self.connection.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def awaits_body(self) -> bool:
        """Whether more of the request's body is to come."""
        return self.connection.their_state is h11.SEND_BODY


def _head_size(request: h11.Request) -> int:
    return len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)


def _is_ambiguous(request: h11.Request) -> bool:
    """Whether two servers could read the end of this request differently, and so the beginning of the next.

    Chunks beside a Content-Length, or in HTTP/1.0, are how requests are smuggled past a proxy (RFC 9112 §6.1, §6.3):
    h11 would take the chunks.
    """
    names = {name for name, _ in request.headers}
    chunked = b"transfer-encoding" in names
    return chunked and (b"content-length" in names or request.http_version == b"1.0")


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
        self._reading = trio.CancelScope(deadline=trio.current_time() + limits.keep_alive_seconds)
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

    def _new_protocol(self, server: tuple[str, int] | None) -> _Http1:
        return _Http1(
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
                while data:
                    # In small pieces: 64 KiB of one-byte chunks keep the parser, and so everybody, busy for 150 ms.
                    for start in range(0, len(data), PIECE):
                        await self._feed(data[start : start + PIECE])
                    data = bytes(self._ahead)
                    self._ahead.clear()

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
        """After our end of file, wait for the client's, if it has sent more than was read."""
        if not self._closed or not (self._protocol.has_unread_request or self._ahead):
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
        inbox = _Inbox()
        assert scope["type"] == "http"
        scope["state"]["peer"] = Peer(self._socket, self._client, scope["http_version"])
        self._nursery.start_soon(self._perform, scope, inbox, send)
        return inbox.put

    async def _perform(
        self, scope: Any, inbox: _Inbox, send: Callable[[ASGISendEvent | None], Awaitable[None]]
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

    # -- out -----------------------------------------------------------------------------------------------

    async def _send(self, event: Event) -> None:
        """Do what the protocol wants: write, close, or arm the idle timer. Only a write has a checkpoint."""
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._reading.cancel()
        elif isinstance(event, Updated):
            self._idle = event.idle
            wait = self._limits.keep_alive_seconds if event.idle else math.inf
            self._reading.deadline = trio.current_time() + wait

    async def _write(self, data: bytes) -> None:
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
