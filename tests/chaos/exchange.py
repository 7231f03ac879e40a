"""One HTTP request on a connection of its own, as slowly or rudely as wanted.

It shares no code with the product; h11 reads the answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import h11
import trio

#: What may go wrong with an exchange while processes are being killed. `h11` raises when an answer is torn.
BROKEN: Final = (OSError, h11.RemoteProtocolError, trio.TooSlowError)

#: Closes with RST: what is under way is thrown away. Source: socket(7), SO_LINGER with 0 seconds.
_RESET: Final = struct.pack("ii", 1, 0)


class Exchange:
    """An open request; a context manager that closes it.

    Attributes:
      status, headers: of the answer; names of headers in lower case.
      opened: monotonic time of the connect.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._parser = h11.Connection(h11.CLIENT)
        self._ended = False
        self.opened = trio.current_time()
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send the request; return when the head of the answer is there. Raises BROKEN."""
        sent = {"Host": "localhost", "Content-Length": str(len(body)), "Connection": "close", **headers}
        request = h11.Request(method=method, target=path, headers=list(sent.items()))
        data = self._parser.send(request) or b""
        if body:
            data += self._parser.send(h11.Data(data=body)) or b""
        data += self._parser.send(h11.EndOfMessage()) or b""
        while data:
            data = data[await self._sock.send(data) :]
        event = await self._next(65536)
        while isinstance(event, h11.InformationalResponse):
            event = await self._next(65536)
        assert isinstance(event, h11.Response), event
        self.status = event.status_code
        self.headers = {name.decode().lower(): value.decode("latin-1") for name, value in event.headers}

    async def read(self, size: int = 65536) -> bytes:
        """Return what has arrived, asking the socket for at most `size` bytes; b"" at the answer's proper end.

        Raises BROKEN.
        """
        event = await self._next(size)
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def read_all(self) -> bytes:
        """Return the rest of the answer. Raises BROKEN."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def _next(self, size: int) -> Any:
        if self._ended:
            return None
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            self._parser.receive_data(await self._sock.recv(size))
        self._ended = isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed))
        return event

    def reset(self) -> None:
        """Close with RST."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._sock.close()


async def connect(port: int, *, buffer: int | None = None) -> Exchange:
    """Connect to the gateway; `buffer` is the size of the receive buffer in bytes. Raises OSError."""
    sock = trio.socket.socket()
    try:
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await sock.connect(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return Exchange(sock)


async def ask(
    port: int,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str],
    body: Any = None,
    timeout: float = 8.0,
) -> tuple[int, Any]:
    """Return status and body of a request with JSON either way; an answer that is no JSON is text.

    Raises BROKEN: refused, reset, torn, or nothing within `timeout` seconds. Whether it had an effect is unknown.
    """
    data = b"" if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **headers} if data else headers
    with trio.fail_after(timeout):
        async with await connect(port) as exchange:
            await exchange.ask(method, path, sent, data)
            answer = await exchange.read_all()
    try:
        return exchange.status, json.loads(answer) if answer else None
    except ValueError:
        return exchange.status, answer.decode(errors="replace")
