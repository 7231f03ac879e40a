"""Requests of one connection, one after the other, over hypercorn's protocol classes.

hypercorn 0.18 parses requests and keeps ASGI's order of messages (`H11Protocol`, `HTTPStream`); the socket,
the tasks and the timers around them are ours, because its own `TCPServer` for trio

- shields writes without an end, so that a client that does not read can hold a task and a shutdown for ever;
- stops reading while a pipelined request waits, and so never notices that its client is gone;
- loses the connection when an application is cancelled inside its final send;
- blocks an application for good that answers before it has read the body (its own queue of 10 parts is full).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, ConnectionState, Scope, TaskGroup
from starlette.types import Message

from gateway import upgrade
from gateway.http1 import Http1
from gateway.inbox import Inbox

if TYPE_CHECKING:
    from gateway.connection import Connection

logger = logging.getLogger(__name__)

#: Bytes to read at once, and to read ahead while a pipelined request waits for its turn.
RECEIVE: Final = 64 * 1024

#: Bytes parsed at a time.
PIECE: Final = 4 * 1024


class Exchanges:
    """What goes to and fro on one connection while it needs a parser."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._service = connection.service
        self._nursery: trio.Nursery
        self._protocol = Http1(
            cast("Any", self._service.app),  # only handed back to spawn_app
            self._service.config,
            self._service.context,
            cast("TaskGroup", self),  # HTTPStream calls nothing of it but spawn_app
            ConnectionState(dict(self._service.state)),
            False,
            connection.client,
            connection.server,
            self._send,
        )

    async def run(self) -> None:
        """Serve requests until the connection is closed, or broken, or a stream is parked."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._read()
            if not self._connection.parked:
                if self._protocol.upgrading is not None and not self._connection.reading.cancel_called:
                    await self._serve_websocket(self._protocol.upgrading)
                await self._protocol.handle(Closed())
        connection = self._connection
        connection.unread = self._protocol.has_unread_request or self._protocol.upgrading is not None
        if connection.parked and connection.unread:
            connection.keeps = (
                False  # what comes next is this request's body, and must not be taken for another one
            )
        elif connection.parked:
            connection.ahead[:0] = self._protocol.unparsed  # pipelined behind the request for the stream

    # -- in ------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Feed the protocol until end of file, the end of our side, or a deadline for reading."""
        with self._connection.reading, contextlib.suppress(OSError, trio.ClosedResourceError):
            while self._connection.ahead or await self._receive():
                await self._feed(self._next_piece())
                if self._protocol.upgrading is not None:
                    self._connection.ahead[:0] = self._protocol.unparsed
                    return

    async def _receive(self) -> bool:
        data = await self._connection.socket.recv(RECEIVE)
        self._connection.ahead += data
        return bool(data)

    def _next_piece(self) -> bytes:
        """Take a small piece: 64 KiB of one-byte chunks keep the parser, and so everybody, busy for 150 ms."""
        piece = bytes(self._connection.ahead[:PIECE])
        del self._connection.ahead[:PIECE]
        return piece

    async def _feed(self, data: bytes) -> None:
        """Hand `data` to the protocol; while it cannot take them, read ahead to notice a disconnect.

        It cannot when a pipelined request waits for the answer to the one before, and when the application
        does not take the body.
        """
        connection = self._connection
        if not connection.idle:
            connection.reading.deadline = math.inf  # the client has done its part
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_ahead)
            await self._protocol.handle(RawData(data))
            nursery.cancel_scope.cancel()
        if not connection.idle and self._protocol.awaits_body:
            connection.reading.deadline = trio.current_time() + self._service.limits.body_seconds

    async def _read_ahead(self) -> None:
        await self._connection.wait_gone()
        self._connection.reading.cancel()

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
        scope["state"]["peer"] = self._connection.peer(scope["http_version"])
        self._connection.keeps = scope["http_version"] == "1.1" and not _is_last(scope)
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
            await self._service.app(scope, inbox.receive, cast("Any", send))
        except Exception:
            # The path without its query, which may hold a ticket.
            logger.exception("the application failed in %s %s", scope["method"], scope["path"])
        except BaseException:
            # Cancelled, alone or in a group. hypercorn would end the answer with a 500, for which an EventSource gives
            # up for ever; after a reset it comes back.
            self._connection.abort()
            raise
        finally:
            inbox.finish()
            if self._connection.parked:
                self._connection.reading.cancel()  # it has another reader now
            else:
                await send(None)

    async def _serve_websocket(self, request: h11.Request) -> None:
        """Serve what is a WebSocket from here on, if the application accepts it."""
        connection = self._connection
        connection.reading = trio.CancelScope()
        session = upgrade.Session(
            self._service.app,
            request,
            upgrade.scope_of(
                request,
                client=connection.client,
                server=connection.server,
                root_path=self._service.config.root_path,
                state={**self._service.state, "peer": connection.peer("1.1")},
            ),
            http=cast("h11.Connection", self._protocol.connection),
            line=connection,
            reading=connection.reading,
            headers=self._service.config.response_headers("h11"),
            message_bytes=self._service.limits.message_bytes,
        )
        self._nursery.start_soon(session.perform)
        with connection.reading:
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
        connection.close()

    async def _next_frames(self) -> bytes:
        if self._connection.ahead:
            await trio.lowlevel.checkpoint()
            return self._next_piece()
        return await self._connection.socket.recv(PIECE)

    # -- out -----------------------------------------------------------------------------------------------

    async def _send(self, event: Event) -> None:
        """Do what the protocol wants: write, close, or arm the idle timer. Only a write has a checkpoint."""
        if isinstance(event, RawData):
            await self._connection.write(event.data)
        elif isinstance(event, Closed):
            self._connection.close()
        elif isinstance(event, Updated):
            self._connection.note_idle(event.idle)


def _is_last(scope: Any) -> bool:
    return any(name == b"connection" and b"close" in value.lower() for name, value in scope["headers"])
