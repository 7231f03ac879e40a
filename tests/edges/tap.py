"""A TCP relay that listens in: what a client asked for, when, what it was told about coming back."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Self

_RETRY = re.compile(rb"\nretry: ([0-9]+)\n")

#: Bytes of a connection's end that are looked at together with what follows, so that no `retry:` is torn.
_OVERLAP = 64


@dataclass
class Request:
    """One request as it went by; `at` is monotonic.

    Attributes:
      retries: milliseconds that the answer told the client to wait, in order.
      over: when the answer's connection ended, None while it has not.
    """

    at: float
    line: str
    headers: dict[str, str]
    retries: list[int] = field(default_factory=list)
    over: float | None = None

    @property
    def last_event_id(self) -> str | None:
        """The cursor that the client brought."""
        return self.headers.get("last-event-id")


class Tap:
    """Listens on a free port of 127.0.0.1 and relays to `url`, as a context manager.

    Attributes:
      url: what clients are given instead.
      requests: everything asked for so far, without the pre-flights of CORS.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[Request] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection, as a network that breaks does."""
        with self._lock:
            everybody = tuple(self._open)
        for sock in everybody:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        mine: list[Request] = []
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            with self._lock:
                self._open |= {client, server}
            up = threading.Thread(target=self._upwards, args=(client, server, mine), daemon=True)
            up.start()
            self._downwards(server, client, mine)
            with self._lock:
                self._open -= {client, server}
            for sock in (client, server):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            up.join()
        for request in mine:
            request.over = request.over or time.monotonic()

    def _upwards(self, client: socket.socket, server: socket.socket, mine: list[Request]) -> None:
        head = b""
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                head += data
                while b"\r\n\r\n" in head:  # nobody here sends a body
                    one, _, head = head.partition(b"\r\n\r\n")
                    self._note(one.decode("latin-1"), mine)
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _note(self, head: str, mine: list[Request]) -> None:
        line, *fields = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in fields)}
        if not line.startswith("OPTIONS "):
            mine.append(Request(time.monotonic(), line, headers))
            self.requests.append(mine[-1])

    def _downwards(self, server: socket.socket, client: socket.socket, mine: list[Request]) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                # The end of a stream is its last chunk, not the end of the connection.
                if data.endswith(b"0\r\n\r\n") and mine:
                    mine[-1].over = time.monotonic()
                client.sendall(data)
                rest += data
                if mine:
                    mine[-1].retries += [int(found[1]) for found in _RETRY.finditer(rest)]
                rest = rest[-_OVERLAP:] if not _RETRY.search(rest) else b""
