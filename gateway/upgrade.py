"""One WebSocket below ASGI, over the frames of wsproto, every wait bounded.

hypercorn's own (`WSStream`) ends the server when a frame comes too early or a header is not ASCII, and it has no
limit for a peer that does not answer. Here what a client sends ends its own connection at most:

- Frames that come before the answer to the handshake wait for it, 64 KiB of them; then nothing more is read.
- A message that is too large, text that is no UTF-8, frames against the protocol end with 1009, 1007, 1002.
- While the application does not take messages, the socket is not read: the client's own writes wait.
- A peer that has not been heard of after a ping is let go; one that does not read, at the write deadline.
- permessage-deflate is not offered: wsproto inflates a whole piece of a frame at once, so 4 KiB could become 4 MiB,
  and each connection would hold two windows of 32 KiB. RFC 6455 §9.1 leaves it to the server.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote

import h11
import trio
from starlette.types import ASGIApp, Message
from wsproto.connection import Connection as Frames
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

from gateway import handshake, problems
from gateway.inbox import Inbox

logger = logging.getLogger(__name__)

#: Seconds between two pings of ours. Proxies close a silent connection after 55 to 60 s (nginx, ALB, Heroku), and a
#: browser's page cannot send pings itself.
PING_SECONDS: Final = 20.0

#: Seconds in which anything has to be heard after one. A phone that changes its network needs a few.
PONG_SECONDS: Final = 10.0

#: Seconds for the peer's half of the closing handshake; below the 1.5 s that connections have at a shutdown.
CLOSE_SECONDS: Final = 1.0


class Gone(OSError):
    """The client has left, or was told to; ASGI wants a send to raise an OSError then."""


class Line(Protocol):
    """The connection below."""

    async def write(self, data: bytes) -> None:
        """Write all of it, or give the connection up; raises nothing."""

    def abort(self) -> None:
        """End the connection with RST."""


class _State(enum.Enum):
    #: the application has not answered yet
    ASKED = enum.auto()
    #: it refuses with an HTTP response, which is under way
    REFUSING = enum.auto()
    #: frames go both ways
    OPEN = enum.auto()
    #: nothing of the application's goes out any more
    OVER = enum.auto()


class Session:
    """A request that becomes a WebSocket, or is refused.

    Three tasks: `perform` runs the application, `listen` takes frames in once `answered` is set and `accepted` is
    true, `keep_alive` finds out whether somebody is there. Whoever runs them calls `end` when listening is over.

    Args:
      http: the parser that read the request; what answers it goes through its state machine.
      reading: the scope in which `listen` runs; gets a deadline with our own close.
      headers: of every response (`Date`).
    """

    def __init__(
        self,
        app: ASGIApp,
        request: h11.Request,
        scope: dict[str, Any],
        *,
        http: h11.Connection,
        line: Line,
        reading: trio.CancelScope,
        headers: Iterable[tuple[bytes, bytes]],
        message_bytes: int,
    ) -> None:
        self._app = app
        self._request = request
        self._scope = scope
        self._http = http
        self._line = line
        self._reading = reading
        self._headers = list(headers)
        self._message_bytes = message_bytes
        self._state = _State.ASKED
        self._inbox = Inbox()
        self._frames = Frames(ConnectionType.SERVER)
        self._parts: list[str] | list[bytes] = []
        self._size = 0
        self._closed = False
        self._reason: tuple[int, str] = (CloseReason.ABNORMAL_CLOSURE, "")
        self._waits_since: float | None = None
        self.answered = trio.Event()
        self.accepted = False

    # -- the application ---------------------------------------------------------------------------------------

    async def perform(self) -> None:
        """Run the application; refuse or close what it leaves open."""
        await self._inbox.put({"type": "websocket.connect"})
        code = CloseReason.NORMAL_CLOSURE
        try:
            await self._app(self._scope, self._inbox.receive, cast("Any", self._send))
        except Gone:
            pass
        except Exception:
            # The path without its query, which may hold a token.
            logger.exception("the application failed in the WebSocket %s", self._scope["path"])
            code = CloseReason.INTERNAL_ERROR
        except BaseException:
            self._line.abort()
            raise
        self._inbox.finish()
        if self._state is _State.ASKED:
            await self._refuse(500, "internal", "the application did not answer")
        await self._close(code, "")
        self._state = _State.OVER
        self.answered.set()

    async def _send(self, message: Message) -> None:
        kind = message["type"].removeprefix("websocket.")
        match self._state, kind:
            case _State.ASKED, "accept":
                await self._accept(message)
            case _State.ASKED, "close":
                await self._refuse(403, "forbidden", "the WebSocket was refused")
            case _State.ASKED, "http.response.start":
                await self._begin_refusal(message["status"], message.get("headers", ()))
            case _State.REFUSING, "http.response.body":
                await self._go_on_refusing(message.get("body", b""), message.get("more_body", False))
            case _State.OPEN, "send":
                await self._line.write(self._frame_of(message))
            case _State.OPEN, "close":
                await self._close(message.get("code") or 1000, message.get("reason") or "")
            case _State.OVER, "close":
                await trio.lowlevel.checkpoint()
            case _State.OVER, _:
                raise Gone("the WebSocket is closed")
            case _:
                raise RuntimeError(f"{message['type']} cannot be sent in state {self._state.name}")

    async def _accept(self, message: Message) -> None:
        headers = handshake.answer_to(self._request, message.get("subprotocol"))
        headers += [*message.get("headers", ()), *self._headers]
        data = self._http.send(
            h11.InformationalResponse(status_code=101, headers=headers, reason=b"Switching Protocols")
        )
        self._state = _State.OPEN
        await self._line.write(data or b"")
        self.accepted = True
        self.answered.set()

    def _frame_of(self, message: Message) -> bytes:
        text, data = message.get("text"), message.get("bytes")
        return self._frames.send(BytesMessage(data or b"") if text is None else TextMessage(text))

    # -- a refusal ---------------------------------------------------------------------------------------------

    async def _refuse(self, status: int, code: str, detail: str) -> None:
        body = problems.document(status, code, detail, instance=self._scope["path"])
        headers = [
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await self._begin_refusal(status, headers)
        await self._go_on_refusing(body, more=False)

    async def _begin_refusal(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        # Not to be used again: frames may have been sent ahead.
        shown = [*headers, (b"connection", b"close"), *self._headers]
        data = self._http.send(h11.Response(status_code=status, headers=shown))
        self._state = _State.REFUSING
        await self._line.write(data or b"")

    async def _go_on_refusing(self, body: bytes, more: bool) -> None:
        data = self._http.send(h11.Data(data=body)) if body else b""
        if not more:
            data = (data or b"") + (self._http.send(h11.EndOfMessage()) or b"")
            self._state = _State.OVER
        await self._line.write(data or b"")
        if not more:
            self.answered.set()

    # -- frames ------------------------------------------------------------------------------------------------

    async def listen(self, receive: Callable[[], Awaitable[bytes]]) -> None:
        """Take frames in until the WebSocket is closed, or the connection is at its end.

        Args:
          receive: returns a few KiB, so that parsing them keeps nobody waiting; b"" at end of file.
        """
        while not self._closed:
            self._waits_since = trio.current_time()
            data = b""
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                data = await receive()
            self._waits_since = None
            if not data:
                return
            await self._take(data)

    async def _take(self, data: bytes) -> None:
        """Act on what `data` completes. Of several pings the last is answered (RFC 6455 §5.5.3)."""
        ping: Ping | None = None
        self._frames.receive_data(data)
        for event in self._frames.events():
            if isinstance(event, Ping):
                ping = event
            elif isinstance(event, TextMessage | BytesMessage):
                await self._collect(event)
            elif isinstance(event, CloseConnection):
                await self._on_close(event)
            if self._closed:
                return  # what follows a close, or a broken frame, cannot be read
        if ping is not None and self._state is _State.OPEN:
            await self._line.write(self._frames.send(ping.response()))

    async def _collect(self, event: TextMessage | BytesMessage) -> None:
        """Add a part of a message; hand it over when it is whole."""
        if self._state is not _State.OPEN:
            return
        self._size += len(event.data.encode()) if isinstance(event.data, str) else len(event.data)
        if self._size > self._message_bytes:
            await self._fail(
                CloseReason.MESSAGE_TOO_BIG, f"LIMITS.message_bytes allows {self._message_bytes}"
            )
            return
        if event.data:
            cast("list[Any]", self._parts).append(event.data)
        if not event.message_finished:
            return
        parts, self._parts, self._size = cast("list[Any]", self._parts), [], 0
        name, nothing = ("text", "") if isinstance(event, TextMessage) else ("bytes", b"")
        await self._inbox.put({"type": "websocket.receive", name: nothing.join(parts)})

    async def _on_close(self, event: CloseConnection) -> None:
        """Answer the peer's close, or what wsproto makes of a frame against the protocol."""
        if self._frames.state is ConnectionState.OPEN:
            await self._fail(event.code, event.reason or "")
        elif self._frames.state is ConnectionState.REMOTE_CLOSING:
            self._reason = (event.code, event.reason or "")
            self._state, self._closed = _State.OVER, True
            await self._line.write(self._frames.send(event.response()))
        else:
            self._closed = True  # ours is out; this is the answer, or nothing that could be read further

    async def _fail(self, code: int, reason: str) -> None:
        """The peer broke a rule: say which, and read no further (RFC 6455 §7.1.7)."""
        self._reason = (code, reason)
        self._parts = []
        self._closed = True
        await self._close(code, reason)

    async def _close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; the peer has CLOSE_SECONDS for its half."""
        if self._state is not _State.OPEN:
            return
        self._state = _State.OVER
        await self._line.write(self._frames.send(CloseConnection(code, reason)))
        self._reading.deadline = trio.current_time() + CLOSE_SECONDS

    # -- the end -----------------------------------------------------------------------------------------------

    async def keep_alive(self) -> None:
        """Ping; abort the connection when nothing is heard in PONG_SECONDS, while somebody listens for it."""
        while True:
            await trio.sleep(PING_SECONDS - PONG_SECONDS)
            asked_at = trio.current_time()
            if self._state is _State.OPEN:
                await self._line.write(self._frames.send(Ping()))
            await trio.sleep(PONG_SECONDS)
            if self._waits_since is not None and self._waits_since <= asked_at:
                logger.info("%s has not answered a ping for %g s: reset", self._scope["client"], PONG_SECONDS)
                self._line.abort()
                return

    def end(self) -> None:
        """Nothing more comes in: the application gets its disconnect."""
        self._state = _State.OVER
        code, reason = self._reason
        self._inbox.disconnect({"type": "websocket.disconnect", "code": int(code), "reason": reason})


def scope_of(request: h11.Request, **others: Any) -> dict[str, Any]:
    """Return the ASGI scope of a request for a WebSocket; `others` are client, server, root_path, state."""
    path, _, query = request.target.partition(b"?")
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "headers": list(request.headers),
        "subprotocols": handshake.subprotocols(request),
        "extensions": {"websocket.http.response": {}},
        **others,
    }
