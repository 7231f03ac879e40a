"""The life of one accepted socket: requests, streams that wait without a task, its end.

Every wait is bounded. No checkpoint lies between the last byte of an answer and the reuse or the end of its connection;
a write ends within `ServeLimits.write_seconds` of its last progress; end of file on the socket is the end of its
client (a half-closed client gets its answer only if the application does not look for a disconnect).

A request is served in one of two ways: gateway.plain reads the plain GETs that open nearly all streams, everything else
is for gateway.exchanges, which has a parser and some tasks. Either may leave a stream *parked*: the application has
returned, parser and tasks are gone, and the socket with some small objects is what is left, until the stream wants to
go on (gateway.parking).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import struct
from typing import Final

import trio
from hypercorn.utils import parse_socket_addr

from gateway import plain
from gateway.bounds import Service
from gateway.exchanges import RECEIVE, Exchanges
from gateway.parking import Home, Parked
from taskkit import linux

logger = logging.getLogger(__name__)

#: Seconds to go on reading after an answer that came before the end of its request. A socket closed with
#: unread bytes in it sends RST, which can overtake the answer (RFC 9112 §9.6). nginx's lingering_timeout is
#: 5 s, for browsers on slow lines; a client that sends more than that fits to read on its own time.
LINGER: Final = 2.0

#: Seconds that a connection has at a shutdown to bring its first request. Browsers open some in advance, which never
#: bring one: they hold the shutdown up by as much.
DRAIN_SECONDS: Final = 0.2


class Peer:
    """The client of one request below ASGI; the application finds it in `scope["state"]["peer"]`.

    Attributes:
      client: address and port, or None on a Unix socket.
      http_version: "1.0" (answers are not chunked) or "1.1".
    """

    __slots__ = ("_connection", "client", "http_version")

    def __init__(self, connection: Connection, http_version: str) -> None:
        self._connection = connection
        self.client = connection.client
        self.http_version = http_version

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 when the connection is over."""
        return self._connection.socket.fileno()

    async def write(self, data: bytes | memoryview) -> None:
        """Write bytes of the response as they are, behind what was sent so far; for who frames them himself.

        Ends like every write within `ServeLimits.write_seconds` of its last progress, then with a reset. Cancelling
        waits for it.
        """
        await self._connection.write(data)

    def park(self, stream: Parked) -> None:
        """Leave the rest of the response to `stream`, without a task; the application returns at once.

        The response has begun, chunked if this is HTTP/1.1, and everything that was sent is out.
        """
        self._connection.parked = stream

    def abort(self) -> None:
        """End the connection at once with RST; unsent bytes are dropped. Again and again does nothing."""
        self._connection.abort()


def reset(sock: trio.socket.SocketType) -> None:
    """Close `sock` with RST instead of FIN; tasks that wait on it get trio.ClosedResourceError."""
    with contextlib.suppress(OSError):
        # l_onoff=1, l_linger=0: unsent data is thrown away, nothing waits for the peer (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Connection:
    """One accepted socket.

    Args:
      sock: connected; owned from here on.
      home: whose connection this is.

    Attributes:
      ahead: what was read, and is not looked at yet.
      idle: whether no request is under way.
      keeps: whether the client may ask for more behind the answer under way.
      broken: whether nothing more can be written.
      closed: whether nothing more is to be written.
      parked: the stream that waits without a task, or is about to.
      unread: whether the answer under way, or the last one, came before the end of its request.
      reading: the scope of what is read in front of an answer, or beside it.
    """

    __slots__ = (
        "_fresh",
        "_home",
        "_writing",
        "ahead",
        "broken",
        "client",
        "closed",
        "idle",
        "keeps",
        "parked",
        "reading",
        "server",
        "service",
        "socket",
        "unread",
    )

    def __init__(self, service: Service, sock: trio.socket.SocketType, home: Home) -> None:
        self.service = service
        self.socket = sock
        self._home = home
        self._fresh = True
        self._writing = trio.Lock()
        self.ahead = bytearray()
        self.idle = True
        self.keeps = False
        self.broken = False
        self.closed = False
        self.parked: Parked | None = None
        self.unread = False
        self.reading = trio.CancelScope(deadline=trio.current_time() + service.limits.headers_seconds)
        self.client: tuple[str, int] | None = None
        self.server: tuple[str, int] | None = None

    async def run(self) -> None:
        """Serve requests until the client or the server ends the connection, or a stream is parked.

        Closes the socket unless a stream is parked; `Home.resume` calls this once more when that wants to go on.
        """
        try:
            if self.parked is not None:
                await self._go_on(self.parked)
            else:
                self._look_around()
            if self._is_open and self.service.fast:
                await self._serve_plain_requests()
            if self._is_open:
                await Exchanges(self).run()
            if self.closed and not self.broken and (self.unread or self.ahead or self._has_unread_bytes()):
                await self._linger()
        except BaseException:
            self.broken = True
            raise
        finally:
            if self.broken or self.closed:
                self._let_go()
            if self.parked is None:
                self.socket.close()
        if self.parked is not None:
            self._home.watch(self)
            self.parked.board(self.socket.fileno(), self._wake)

    @property
    def _is_open(self) -> bool:
        return not (self.closed or self.broken or self.parked)

    def _look_around(self) -> None:
        try:
            self.client = parse_socket_addr(self.socket.family, self.socket.getpeername())
            self.server = parse_socket_addr(self.socket.family, self.socket.getsockname())
        except OSError:
            self.broken = True  # reset while it waited in the backlog

    # -- requests ------------------------------------------------------------------------------------------

    async def _serve_plain_requests(self) -> None:
        """Serve requests as long as there are none but plain ones."""
        while self._is_open and (self.ahead or await self._receive()):
            request = plain.read(self.ahead, self.service.limits.header_bytes)
            if request is None:
                return
            del self.ahead[: request.size]
            self.note_idle(False)
            self.keeps = True
            answer = plain.Answer(self, framed=True)
            scope = request.scope(self, self.peer("1.1"))
            direct = self.service.direct
            app = (direct(request) if direct is not None else None) or self.service.app
            try:
                await app(scope, answer.receive, answer.send)
            except Exception:
                # The path without its query, which may hold a ticket.
                logger.exception("the application failed in GET %s", scope["path"])
            except BaseException:
                self.abort()
                raise
            self._end_answer(answer)
            # Some thousand requests may have come at once: others have their turns between them.
            if self.ahead and self._is_open:
                await trio.lowlevel.checkpoint()

    async def _receive(self) -> bool:
        """Read something in front of a request; without anything, close."""
        data = b""
        with self.reading, contextlib.suppress(OSError, trio.ClosedResourceError):
            data = await self.socket.recv(RECEIVE)
        if data:
            self.ahead += data
            self._fresh = False
            self.reading = trio.CancelScope(deadline=self.reading.deadline)
        else:
            self.close()
        return bool(data)

    def _end_answer(self, answer: plain.Answer) -> None:
        if self.parked is not None:
            return
        if answer.complete and self.keeps and not self.service.context.terminated.is_set():
            self.note_idle(True)
        else:
            self.close()

    def note_idle(self, idle: bool) -> None:
        """Note whether a request is under way; set the time for the next one."""
        self.idle = idle
        self.reading.deadline = (
            trio.current_time() + self.service.limits.headers_seconds if idle else math.inf
        )

    async def wait_gone(self) -> None:
        """Read ahead until the client is at its end; with RECEIVE bytes only a failing write can tell that it is."""
        with contextlib.suppress(OSError, trio.ClosedResourceError):
            while len(self.ahead) < RECEIVE:
                data = await self.socket.recv(RECEIVE - len(self.ahead))
                if not data:
                    return
                self.ahead += data
            await trio.sleep_forever()

    def peer(self, http_version: str) -> Peer:
        """Return the client of a request."""
        return Peer(self, http_version)

    # -- parked --------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._home.forget(self)
        self._home.resume(self)

    async def _go_on(self, stream: Parked) -> None:
        """Have a stream that was parked go on, behind its head."""
        self.parked = None
        self.reading = trio.CancelScope()
        answer = plain.Answer(self, framed=stream.framed, begun=True)
        try:
            await stream.resume(answer.receive, answer.send)
        except Exception:
            logger.exception("a stream failed after it had waited")
        except BaseException:
            self.abort()
            raise
        self._end_answer(answer)

    def hang_up(self) -> None:
        """The client has gone while a stream was parked."""
        self.broken = True
        self._let_go()
        self.socket.close()

    def _let_go(self) -> None:
        if self.parked is not None:
            self._home.forget(self)
            stream, self.parked = self.parked, None
            stream.abandon()

    # -- ends ----------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """End the connection now if no request is under way; otherwise it ends after its answer.

        A request that is on its way already is answered, too: a connection that was accepted a moment ago has
        DRAIN_SECONDS to send it, another one that time to have it read. Closing would reset them.
        """
        if not self.idle:
            return
        if self._fresh or self._has_unread_bytes():
            self.reading.deadline = min(self.reading.deadline, trio.current_time() + DRAIN_SECONDS)
        else:
            self.reading.cancel()

    def _has_unread_bytes(self) -> bool:
        return self.socket.fileno() != -1 and linux.bytes_to_read(self.socket.fileno()) > 0

    def close(self) -> None:
        """Write nothing more, read nothing more."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.reading.cancel()

    def abort(self) -> None:
        """End the connection with RST, whatever is under way."""
        self.broken = True
        self._let_go()
        self.reading.cancel()
        reset(self.socket)

    async def _linger(self) -> None:
        """After our end of file, wait for the client's: it has sent more than was read, or may have."""
        with trio.move_on_after(LINGER), contextlib.suppress(OSError, trio.ClosedResourceError):
            while await self.socket.recv(RECEIVE):
                pass

    # -- out -----------------------------------------------------------------------------------------------

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, or give the connection up.

        Shielded, since half a chunk would spoil the stream, and h11 believes already that these bytes are
        out; bounded, since the peer decides how long a write takes.
        """
        if self.broken:
            await trio.lowlevel.checkpoint()  # an application that only sends must not spin
            return
        with trio.CancelScope(shield=True) as scope:
            async with self._writing:
                await self._write_pieces(memoryview(data), scope)
        if scope.cancelled_caught:
            logger.info("%s did not read for %g s: reset", self.client, self.service.limits.write_seconds)
            self.abort()

    async def _write_pieces(self, rest: memoryview, scope: trio.CancelScope) -> None:
        while rest and not self.broken:
            scope.deadline = trio.current_time() + self.service.limits.write_seconds
            try:
                rest = rest[await self.socket.send(rest) :]
            except (OSError, trio.ClosedResourceError):
                self.broken = True
                self.reading.cancel()

    def write_now(self, data: bytes) -> memoryview:
        """Write what fits without waiting, when nobody else writes; return the rest."""
        rest = memoryview(data)
        if self.broken or self._writing.locked():
            return rest
        try:
            return rest[os.write(self.socket.fileno(), data) :]
        except OSError:  # full; or gone, as the next write will find
            return rest
