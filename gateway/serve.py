"""HTTP/1 server for one ASGI application: accepts, bounds, ends connections.

Rule: what goes wrong in one connection ends that connection and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import random
import resource
import socket
from collections.abc import Mapping
from typing import Any, Final

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from starlette.types import ASGIApp

from gateway import problems
from gateway.bounds import Direct, ServeLimits, Service
from gateway.connection import Connection, Peer, reset
from gateway.hangups import Hangups
from gateway.tally import DoorTally

__all__ = ["Peer", "ServeLimits", "serve"]

logger = logging.getLogger(__name__)

#: Seconds between two attempts to accept while the process has no descriptor left, as in
#: trio.serve_listeners. The client waits in the backlog meanwhile and is served when another one has gone.
ACCEPT_PAUSE: Final = 0.1

#: Connections taken in one turn of the loop: each keeps it for 0.2 ms, and those who are there already wait.
ACCEPTS: Final = 8

#: Seconds between two lines in the log about that.
ACCEPT_COMPLAINT: Final = 10.0

#: Descriptors that no connection gets, however low RLIMIT_NOFILE is by now: those of new runners, three each, of the
#: store's readers, of large messages. A runner's ends that find no room cost the gateway its life.
RESERVE: Final = 64

#: Seconds' worth of connections that may come at once: a page opens six, a restart brings back hundreds.
BURST_SECONDS: Final = 1.0

#: Clients above the cap that are told so at the same time; further ones get RST without a word.
REFUSALS: Final = 64

#: Seconds that such a client has for its request and for taking the answer.
REFUSAL_SECONDS: Final = 1.0

#: Seconds in `Retry-After` of a refusal; event-stream clients get a random time between the two of
#: BUSY_RETRY.
REFUSAL_RETRY: Final = 2
BUSY_RETRY: Final = (5.0, 15.0)

#: Unsent bytes up to which the kernel calls a socket writable. 16 KiB is trio's choice for SocketStream:
#: less in the buffer makes a slow client visible early, without costing throughput.
NOTSENT_LOWAT: Final = 16 * 1024

_TCP_NOTSENT_LOWAT: Final = 25  # linux/tcp.h; Python's socket module has the name from 3.12 on

_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_NO_LISTENER: Final = frozenset({errno.EBADF, errno.ENOTSOCK, errno.EINVAL, errno.EFAULT})


async def serve(
    app: ASGIApp,
    sockets: list[socket.socket],
    *,
    limits: ServeLimits,
    shutdown: trio.Event,
    grace: float,
    state: Mapping[str, Any],
    door: DoorTally | None = None,
    fast: bool = True,
    direct: Direct | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` on listening sockets until `shutdown` is set, then for at most `grace` seconds more.

    The sockets stay open and listening: they belong to somebody else, and what waits in their backlog is
    the next gateway's. (They become non-blocking, which is a property shared with every duplicate of them.)
    Says `started` when it accepts. After `shutdown`, idle connections end at once, others after the answer
    under way; what is left after `grace` is reset. Cancelling ends all connections with RST at once.

    Args:
      state: goes into every request's `scope["state"]`; `peer` is added to it.
      door: connections are counted here.
      fast, direct: the short ways of some requests (gateway.bounds.Service).

    Raises:
      ExceptionGroup: of an OSError, when a socket in `sockets` does not listen. The caller's fault.
    """
    with Hangups() as hangups:
        service = Service(app, _config(limits), WorkerContext(None), limits, state, fast, direct)
        server = _Server(service, door or DoorTally(), hangups)
        async with trio.open_nursery() as nursery:
            server.nursery = nursery
            nursery.start_soon(hangups.run)
            try:
                await server.accept_until(shutdown, sockets, task_status)
                await server.drain(grace)
            finally:
                server.abort()
                nursery.cancel_scope.cancel()


class _Pace:
    """So many connections per second, with a burst: what comes faster waits in the backlog and is refused by nobody.

    Each costs a task, a parser, and with a token its verification; a flood of them must leave time for the streams.
    """

    def __init__(self, per_second: int) -> None:
        self._interval = 1 / per_second
        self._due = -BURST_SECONDS

    def take(self, now: float) -> float:
        """Count one connection; return seconds until there is room for the next."""
        self._due = max(self._due, now - BURST_SECONDS) + self._interval
        return max(0.0, self._due - now)


class _Server:
    """The connections of one `serve` call."""

    def __init__(self, service: Service, door: DoorTally, hangups: Hangups) -> None:
        self.nursery: trio.Nursery
        self._door = door
        self._hangups = hangups
        self._limits = limits = service.limits
        self._service = service
        self._room = _room(limits.connections)
        self._pace = _Pace(limits.accepts_per_second)
        self._open: set[Connection] = set()
        self._refusing: set[trio.socket.SocketType] = set()
        self._gone = trio.Event()
        self._complained_at = -ACCEPT_COMPLAINT

    async def accept_until(
        self, shutdown: trio.Event, sockets: list[socket.socket], task_status: trio.TaskStatus[None]
    ) -> None:
        """Accept connections until `shutdown`; close only our duplicates of the listening sockets."""
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(sock.dup()) for sock in sockets]
            for listener in listeners:
                listener.setblocking(False)
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener)
                task_status.started()
                await shutdown.wait()
                accepting.cancel_scope.cancel()

    async def drain(self, grace: float) -> None:
        """End idle connections, give the others `grace` seconds."""
        await self._service.context.terminated.set()
        for connection in tuple(self._open):
            connection.drain()
        with trio.move_on_after(grace):
            while self._open:
                self._gone = trio.Event()
                await self._gone.wait()
        if self._open:
            logger.info("%d connections were reset %g s after the shutdown", len(self._open), grace)

    def abort(self) -> None:
        """Reset what is left, so that not even a write under its shield goes on."""
        for connection in tuple(self._open):
            parked = connection.parked
            connection.abort()
            if parked:
                self._over(connection)
        for sock in tuple(self._refusing):
            reset(sock)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            await trio.sleep(self._accept_some(listener))

    def _accept_some(self, listener: socket.socket) -> float:
        """Take a few connections; return seconds until there may be more. The others have their turn in any case."""
        for _ in range(ACCEPTS):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _NO_LISTENER:
                    raise
                # Otherwise accept(2) reports what happened to one connection in the backlog, and removes it.
                return self._pause_after(error)
            self._admit(trio.socket.from_stdlib_socket(sock))
            if wait := self._pace.take(trio.current_time()):
                return wait
        return 0.0

    def _pause_after(self, error: OSError) -> float:
        if error.errno not in _NO_DESCRIPTOR:
            return 0.0
        if trio.current_time() >= self._complained_at + ACCEPT_COMPLAINT:
            self._complained_at = trio.current_time()
            logger.error("cannot accept connections, trying on: %s (open: %d)", error, len(self._open))
        return ACCEPT_PAUSE

    def _admit(self, sock: trio.socket.SocketType) -> None:
        """Give the connection a task. Counted here, not in the task, so that no burst slips past the cap."""
        if len(self._open) >= self._room or _is_in_reserve(sock):
            self._refuse(sock)
            return
        try:
            _tune(sock, self._limits)
        except OSError:
            sock.close()  # reset while it waited in the backlog
            return
        connection = Connection(self._service, sock, self)
        self._open.add(connection)
        self._door.accepted += 1
        self._door.open += 1
        self.nursery.start_soon(self._run, connection)

    # --- what parked connections want (gateway.parking) -------------------------------------------------------

    def watch(self, connection: Connection) -> None:
        """Notice when its client hangs up."""
        self._hangups.watch(connection.socket.fileno(), functools.partial(self._hung_up, connection))

    def forget(self, connection: Connection) -> None:
        """Look no longer."""
        self._hangups.forget(connection.socket.fileno())

    def resume(self, connection: Connection) -> None:
        """Give it a task again."""
        self.nursery.start_soon(self._run, connection)

    def _hung_up(self, connection: Connection) -> None:
        connection.hang_up()
        self._over(connection)

    # --- one connection -------------------------------------------------------------------------------------

    async def _run(self, connection: Connection) -> None:
        """Run one connection behind its bulkhead: hypercorn's own server ends with the first that raises."""
        try:
            await connection.run()
        except* Exception as errors:  # a cancellation among them goes on upwards
            logger.error("a connection failed, the others go on", exc_info=errors)
        finally:
            if connection.parked is None:
                self._over(connection)

    def _over(self, connection: Connection) -> None:
        if connection not in self._open:
            return  # reset when it was about to go on
        self._open.remove(connection)
        self._door.open -= 1
        self._gone.set()

    def _refuse(self, sock: trio.socket.SocketType) -> None:
        self._door.refused += 1
        if len(self._refusing) >= REFUSALS:
            reset(sock)
            return
        self._refusing.add(sock)
        self.nursery.start_soon(self._tell_busy, sock)

    async def _tell_busy(self, sock: trio.socket.SocketType) -> None:
        """Answer that there is no room, after a look at the request's head.

        EventSource gives up for good on any status but 200, so its clients get a stream that only says when
        to come back (CONTRACT §2.3).
        """
        try:
            with trio.move_on_after(REFUSAL_SECONDS), contextlib.suppress(OSError, trio.ClosedResourceError):
                head = await sock.recv(self._limits.header_bytes)
                await sock.send(_busy_stream() if b"text/event-stream" in head.lower() else _busy_problem())
                sock.shutdown(socket.SHUT_WR)
                while await sock.recv(self._limits.header_bytes):
                    pass
        finally:
            self._refusing.discard(sock)
            sock.close()


def _room(connections: int) -> int:
    """Return how many connections there may be: `connections`, or what RLIMIT_NOFILE leaves room for."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if descriptors == resource.RLIM_INFINITY else min(connections, descriptors * 3 // 4)


def _is_in_reserve(sock: trio.socket.SocketType) -> bool:
    """Whether the connection has one of the last descriptors: the kernel gives out the lowest that is free."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return descriptors != resource.RLIM_INFINITY and sock.fileno() >= descriptors - min(
        RESERVE, descriptors // 4
    )


def _config(limits: ServeLimits) -> Config:
    config = Config()
    config.errorlog = logger  # hypercorn would hang a handler of its own on stderr
    config.accesslog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = limits.header_bytes
    return config


def _tune(sock: trio.socket.SocketType, limits: ServeLimits) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    # A peer that vanished without FIN: the kernel gives up after this long without an acknowledgement
    # (tcp(7)), also for bytes that our write deadline does not see because they fit the buffer.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.write_seconds * 2 * 1000))


def _raw(status: str, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def _busy_problem() -> bytes:
    body = problems.document(
        503,
        "too-many-connections",
        "the gateway has as many connections as it may; try again",
        retry_after=REFUSAL_RETRY,
    )
    headers = {
        "Content-Type": problems.MEDIA_TYPE,
        "Content-Length": str(len(body)),
        "Retry-After": str(REFUSAL_RETRY),
        "Cache-Control": "no-store",
        "Connection": "close",
    }
    return _raw("503 Service Unavailable", headers, body)


def _busy_stream() -> bytes:
    # Random, so that those who are refused together do not come back together.
    milliseconds = int(random.uniform(*BUSY_RETRY) * 1000)
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-store, no-transform",
        "X-Accel-Buffering": "no",
        "Connection": "close",
    }
    return _raw("200 OK", headers, f"retry: {milliseconds}\n\nevent: stream.busy\ndata: {{}}\n\n".encode())
