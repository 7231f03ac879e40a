"""WebSocket clients of the tests' own: frames by hand, right or wrong, with a client that speaks them."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Self

from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

#: RFC 6455 §1.3: the key of its example, and what a server makes of it.
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def upgrade(path: str, *headers: str, key: str | None = KEY, version: str | None = "13") -> bytes:
    """Return a handshake; `key` or `version` None leaves that header out."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
    ]
    lines += [] if key is None else [f"Sec-WebSocket-Key: {key}"]
    lines += [] if version is None else [f"Sec-WebSocket-Version: {version}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1")


def frame(
    payload: bytes = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    masked: bool = True,
    reserved: int = 0,
    announced: int | None = None,
) -> bytes:
    """Return a frame of a client, as wrong as wanted; `announced` is the length that it claims."""
    size = len(payload) if announced is None else announced
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    mask = os.urandom(4) if masked else b""
    if size < 126:
        head = struct.pack("!BB", first, size | bool(masked) << 7)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 126 | bool(masked) << 7, size)
    else:
        head = struct.pack("!BBQ", first, 127 | bool(masked) << 7, size)
    return (
        head + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        if masked
        else head + payload
    )


class Reader:
    """What a server says, from its bytes.

    Attributes:
      texts: messages so far.
      pings: payloads so far, and what answers them, to be sent.
      pongs: payloads so far.
      code, reason: of its close; None as long as there was none.
    """

    def __init__(self) -> None:
        self._frames = Connection(ConnectionType.CLIENT)
        self._part = ""
        self.texts: list[str] = []
        self.pings: list[bytes] = []
        self.pongs: list[bytes] = []
        self.code: int | None = None
        self.reason = ""
        self.answers = b""

    def receive(self, data: bytes) -> None:
        """Take bytes as they came."""
        self._frames.receive_data(data)
        for event in self._frames.events():
            if isinstance(event, TextMessage):
                self._part += event.data
                if event.message_finished:
                    self.texts.append(self._part)
                    self._part = ""
            elif isinstance(event, Ping):
                self.pings.append(bytes(event.payload))
                self.answers += frame(bytes(event.payload), PONG)
            elif isinstance(event, Pong):
                self.pongs.append(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                self.code, self.reason = int(event.code), event.reason or ""


class SocketClient:
    """A WebSocket over a blocking socket.

    Args:
      url: `http://HOST:PORT`.
      headers: further lines of the handshake.

    Attributes:
      status: of the answer; 101 means that frames follow.
      body: of any other answer.
      messages: everything that has been said so far, parsed.
    """

    def __init__(
        self, url: str, path: str, *headers: str, token: str | None = None, timeout: float = 10.0
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        self._reader = Reader()
        self._taken = 0
        self.messages: list[dict[str, Any]] = []
        self._socket = socket.create_connection((parts.hostname or "", parts.port), timeout)
        bearer = [] if token is None else [f"Authorization: Bearer {token}"]
        self._socket.sendall(upgrade(path, *bearer, *headers))
        head, rest = self._read_head()
        self.head = head
        self.status = int(head.split(" ", 2)[1])
        self.body = b""
        if self.status == 101:
            self._receive(rest)
        else:
            self.body = rest + b"".join(iter(lambda: self._socket.recv(65536), b""))

    def _read_head(self) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            part = self._socket.recv(65536)
            assert part, f"end of file within the head {data!r}"
            data += part
        head, _, rest = data.partition(b"\r\n\r\n")
        return head.decode("latin-1"), rest

    def _receive(self, data: bytes) -> None:
        self._reader.receive(data)
        new = self._reader.texts[len(self.messages) :]
        self.messages += [json.loads(text) for text in new]
        if self._reader.answers and self._reader.code is None:
            self._socket.sendall(self._reader.answers)
        self._reader.answers = b""

    @property
    def code(self) -> int | None:
        """Code of the server's close, None before."""
        return self._reader.code

    def say(self, message: Any) -> None:
        """Send a message; text goes as it is."""
        text = message if isinstance(message, str) else json.dumps(message)
        self._socket.sendall(frame(text.encode()))

    def read(self, timeout: float = 10.0) -> Iterator[dict[str, Any]]:
        """Yield messages, those first that have come already, until the server closes or nothing comes in time.

        Raises:
          TimeoutError: `timeout` seconds have passed.
        """
        end = time.monotonic() + timeout
        while True:
            while self._taken < len(self.messages):
                self._taken += 1
                yield self.messages[self._taken - 1]
            if self.code is not None:
                return
            self._socket.settimeout(max(0.01, end - time.monotonic()))
            data = self._socket.recv(65536)
            if not data:
                return
            self._receive(data)

    def until(
        self, predicate: Callable[[dict[str, Any]], object], timeout: float = 10.0
    ) -> list[dict[str, Any]]:
        """Return what comes next, up to the message that `predicate` wants."""
        found = []
        for message in self.read(timeout):
            found.append(message)
            if predicate(message):
                return found
        raise AssertionError(f"closed with {self.code} after {found}")

    def rest(self, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Return what comes until the server closes."""
        return list(self.read(timeout))

    def close(self) -> None:
        """Close the connection without a word."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
