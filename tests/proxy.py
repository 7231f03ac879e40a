"""A proxy in front of a gateway that does what bad networks do: it cuts, and it swallows streams."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterable
from typing import Self

#: SO_LINGER that turns close() into a reset.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Carries connections to `url`, as a context manager.

    Args:
      cuts: for each connection in turn, after how many bytes of answers it is reset; None: never. At its end, never.

    Attributes:
      url: of the proxy.
      swallows: whether the answers to requests for event streams are kept back, as by a proxy that buffers; such a one
        knows nothing of WebSocket either.
      requests: first lines of what was asked for.
    """

    def __init__(self, url: str, cuts: Iterable[int | None] = ()) -> None:
        parts = urllib.parse.urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        self._cuts = itertools.chain(cuts, itertools.repeat(None))
        self.swallows = False
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        self.cut()
        for thread in list(self._open.values()):
            thread.join(5)

    def cut(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            for client in self._open:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RD)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=(client, next(self._cuts)), daemon=True)
            with self._lock:
                self._open[client] = thread
            thread.start()

    def _carry(self, client: socket.socket, budget: int | None) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self._target, 5) as gateway:
            self._pump(client, gateway, budget)
        with self._lock:
            del self._open[client]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        client.close()

    def _pump(self, client: socket.socket, gateway: socket.socket, budget: int | None) -> None:
        """Carry bytes both ways until either side ends, or `budget` bytes of answers have passed."""
        swallowing = False
        while budget is None or budget > 0:
            ready, _, _ = select.select([client, gateway], [], [], 60)
            for source in ready:
                data = source.recv(65536)
                if not data:
                    return
                if source is client:
                    self.requests.append(data.partition(b"\r\n")[0].decode("latin-1"))
                    swallowing = self.swallows and b"text/event-stream" in data
                    if self.swallows and b"Upgrade: websocket" in data:
                        return
                    gateway.sendall(data)
                elif not swallowing:
                    client.sendall(data[:budget])
                    budget = None if budget is None else budget - len(data)
