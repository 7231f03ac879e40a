"""HTTP/1 as hypercorn parses it, without the doors to other protocols.

hypercorn speaks HTTP/2 on plain text ports whenever asked, with no back-pressure and five ways to crash it, and its own
WebSocket ends the server when a frame comes too early. What is refused here is refused with a problem document.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import h11
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol

from gateway import handshake, heads, problems


class Http1(H11Protocol):
    """The protocol of one connection.

    Attributes:
      upgrading: the request for a WebSocket with which HTTP ends here, once there was one.
    """

    upgrading: h11.Request | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parser = heads.Parser(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        self.connection = self._parser

    async def _check_protocol(self, event: h11.Request) -> None:
        """Switch to nothing: hypercorn would go over to HTTP/2 here (`Upgrade: h2c`, `PRI * HTTP/2.0`)."""

    async def handle(self, event: Event) -> None:
        """Take what the connection brings; bytes behind the last request are nobody's."""
        if isinstance(event, RawData) and self._parser.is_through:
            return
        await super().handle(event)

    async def _create_stream(self, request: h11.Request) -> None:
        code = heads.refusal(request, self.config.h11_max_incomplete_size)
        plain = heads.in_origin_form(request)
        if code is not None or plain is None:
            await self._refuse(code or "bad-request")
            return
        if handshake.is_asked_for(plain):
            if complaint := handshake.complaint(plain):
                await self._refuse(*complaint)
            else:
                self.upgrading = plain
            return
        # A server may ignore another upgrade (RFC 9110 §7.8); the application answers the plain request. So no byte
        # reaches hypercorn's WSStream, which an early frame or a header that is not ASCII crashes.
        await super()._create_stream(heads.without(plain, b"upgrade"))

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

    async def _refuse(self, code: str, detail: str = "") -> None:
        await self._answer_with(code, detail)
        await self.send(Closed())

    async def _send_error_response(self, status_code: int) -> None:
        """Answer what the parser refuses. hypercorn calls this."""
        await self._answer_with(problems.code_of(status_code))

    async def _answer_with(self, code: str, detail: str = "") -> None:
        status_code = problems.CODES[code].status
        detail = detail or "the request does not follow HTTP/1.1, or not our limits"
        body = problems.document(status_code, code, detail)
        headers = [
            *(handshake.OFFER if status_code == 426 else ()),
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

    @property
    def unparsed(self) -> bytes:
        """What came behind the request with which HTTP ended."""
        return self.connection.trailing_data[0]
