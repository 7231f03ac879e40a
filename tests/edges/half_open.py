"""Thousands of connections that never finish their request, in a process that has the descriptors for it.

    python -m tests.edges.half_open HOST PORT NUMBER

Commands come as JSON lines. The first line it says is `{"opened": …}`. Half of the connections say nothing, the others
stop inside the head.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import select
import socket
import sys

#: Connections under way at once: below the backlog of a listener (1,024), so that no SYN is dropped and sent again.
_BURST = 500

_BEGINNINGS = (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")


class _Crowd:
    """The connections, with what became of them."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._poll = select.poll()
        self._open: dict[int, socket.socket] = {}
        self.ended = 0

    def connect(self, number: int) -> int:
        """Open so many; return how many the kernel let."""
        beginnings = itertools.cycle(_BEGINNINGS)
        opened = 0
        while opened < number:
            batch = [self._begin() for _ in range(min(_BURST, number - opened))]
            for sock in batch:
                self._settle(sock, next(beginnings))
            opened += len(batch)
        return opened

    def _begin(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(self._address)
        return sock

    def _settle(self, sock: socket.socket, beginning: bytes) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        poll.poll(30_000)
        with contextlib.suppress(OSError):
            sock.send(beginning)
        self._open[sock.fileno()] = sock
        self._poll.register(sock, select.POLLIN)

    def look(self) -> dict[str, int]:
        """Close what the server has ended, whatever it said; count."""
        while ready := self._poll.poll(0):
            for fd, _ in ready:
                self._read(fd)
        return {"ended": self.ended, "open": len(self._open)}

    def _read(self, fd: int) -> None:
        try:
            data = self._open[fd].recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._poll.unregister(fd)
            self._open.pop(fd).close()
            self.ended += 1


def main(host: str, port: str, number: str) -> None:
    """Open the connections, then answer every line with how many are left."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    crowd = _Crowd((host, int(port)))
    print(json.dumps({"opened": crowd.connect(int(number))}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(crowd.look()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
