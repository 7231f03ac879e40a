"""Plain GETs of streams, served without a parser.

h11 with hypercorn's protocol around it takes 1.2 ms and four tasks for what opens a stream; this 0.1 ms and none. What
is plain: one complete head without anything unusual, by the grammar that h11 has (RFC 9112, printable ASCII only). The
slightest doubt is for gateway.exchanges, which also has all the refusals; the application is the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio
from hypercorn.config import Config
from starlette.types import Message

from gateway import sse

if TYPE_CHECKING:
    from gateway.connection import Connection, Peer

_HEAD: Final = re.compile(
    rb"GET (/[A-Za-z0-9/._~-]*/events)(?:\?([!-~]*))? HTTP/1\.1\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[!-~](?:[ -~]*[!-~])?\r\n)+)\r\n"
)

#: Headers that decide about more than this request: what comes behind it, whether it has a body, what is spoken next.
_UNUSUAL: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

_EMPTY: Final = (204, 304)


@dataclass(frozen=True, slots=True)
class Request:
    """A plain GET; `size` is what its head takes of the bytes that were read."""

    size: int
    path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]

    def scope(self, connection: Connection, peer: Peer) -> dict[str, Any]:
        """Return the ASGI scope, as hypercorn's HTTPStream makes it."""
        service = connection.service
        return {
            "type": "http",
            "http_version": "1.1",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": "GET",
            "scheme": "http",
            "path": self.path.decode("ascii"),
            "raw_path": self.path,
            "query_string": self.query,
            "root_path": service.config.root_path,
            "headers": self.headers,
            "client": connection.client,
            "server": connection.server,
            "state": {**service.state, "peer": peer},
            "extensions": {},
        }


def read(data: bytearray, most: int) -> Request | None:
    """Return the request that `data` begins with if it is plain, and its head has at most `most` bytes."""
    match = _HEAD.match(data)
    if match is None or match.end() > most:
        return None
    headers = []
    hosts = 0
    for line in match[3].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name in _UNUSUAL and (name, value.lower()) != (b"connection", b"keep-alive"):
            return None
        hosts += name == b"host"
        headers.append((name, value))
    if hosts != 1:
        return None
    return Request(match.end(), match[1], match[2] or b"", headers)


class Answer:
    """Both ends of one request for the application: what it receives, and where its answer goes.

    Args:
      framed: whether an answer of unknown length is chunked.
      begun: its head is out already.

    Attributes:
      complete: the answer is over, and whole.
    """

    __slots__ = ("_begun", "_connection", "_framed", "_head", "_is_read", "complete")

    def __init__(self, connection: Connection, *, framed: bool, begun: bool = False) -> None:
        self._connection = connection
        self._framed = framed
        self._head = b""
        self._begun = begun
        self._is_read = begun
        self.complete = False

    async def receive(self) -> Message:
        """Return the request, which has no body; then wait for the client to leave."""
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._connection.wait_gone()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a part of the answer. The head leaves with the first bytes behind it."""
        if message["type"] == "http.response.start" and not self._begun:
            self._begin(message["status"], list(message.get("headers", ())))
            return
        if message["type"] != "http.response.body" or self.complete:
            raise RuntimeError(f"{message['type']} cannot be sent now")
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._framed:
            body = (sse.chunk(body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        head, self._head = self._head, b""
        self.complete = not more
        if rest := self._connection.write_now(head + body):
            await self._connection.write(rest)
        elif more and not head:
            await trio.lowlevel.checkpoint()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        self._framed = status not in _EMPTY and not any(
            name.lower() == b"content-length" for name, _ in headers
        )
        if self._framed:
            headers.append((b"Transfer-Encoding", b"chunked"))
        config: Config = self._connection.service.config
        headers += config.response_headers("h11")
        if any(name.lower() == b"connection" and value.lower() == b"close" for name, value in headers):
            self._connection.keeps = False
        lines = [b"HTTP/1.1 %d " % status, *(b"%b: %b" % pair for pair in headers)]
        if any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines):
            raise RuntimeError("a header of the answer has a line break in it")
        self._head = b"\r\n".join([*lines, b"", b""])
