"""Many connections to one stream, in a process of its own that does little but read.

It shares two cores with the server that is measured, so it has to be cheap: one epoll loop, one buffer for all, events
counted by a byte that only they have; the times in them are looked at on one connection of `STRIDE`. That every
connection has got every event is checked all the same.

A stream's events have `MARK` once in each one's data, and there the time of their making as `"at": seconds`.
"""

from __future__ import annotations

import json
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

#: The byte that every event has once.
MARK = b"~"

#: Every so many-th connection, in the order they were opened, has its events' times looked at.
STRIDE = 10

#: Connections that wait for their first byte at the same time: fewer than any server's backlog.
WINDOW = 32

#: Of a connection that does not read.
SMALL_BUFFER = 4_096

_BUFFER = 262_144
_STAMP = re.compile(rb'"at": ?([0-9.]+)')


@dataclass(frozen=True, slots=True)
class Target:
    """A stream: where its server listens, and what to ask it."""

    port: int
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self) -> bytes:
        """Return the request for it."""
        lines = [
            f"GET {self.path} HTTP/1.1",
            "Host: localhost",
            "Accept: text/event-stream",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True, slots=True)
class Heard:
    """What so many connections got of so many events.

    Attributes:
      deliveries, missing, extra: events that came, did not come, came although they should not.
      seconds: from the making of the first to the arrival of the last.
      p50, p99: seconds from the making of an event to its arrival; 0 without events.
      busy: seconds of CPU that the reading took.
    """

    deliveries: int
    missing: int
    extra: int
    seconds: float
    p50: float
    p99: float
    busy: float


class Readers:
    """The process, seen from outside: `opened` is the seconds that all connections took to be answered."""

    def __init__(self, process: subprocess.Popen[str], count: int) -> None:
        self._process = process
        self._count = count
        self.opened = float(self._line())

    @property
    def rate(self) -> float:
        """Connections answered per second."""
        return self._count / self.opened

    def heard(self) -> Heard:
        """Wait until every connection has got every event, or nothing has come for the order's patience."""
        return Heard(**self._line())

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the readers have left: what they said is above"
        return json.loads(line)


@contextmanager
def reading(
    target: Target,
    count: int,
    events: int,
    *,
    window: int = WINDOW,
    patience: float = 20.0,
    stuck: int = 0,
    stuck_target: Target | None = None,
) -> Iterator[Readers]:
    """Open `count` connections, all answered when the block begins; they are closed behind it.

    Args:
      events: that each is to get.
      patience: seconds without any byte after which what is missing is missing.
      stuck, stuck_target: so many connections more, which never read.
    """
    order = {
        "target": asdict(target),
        "count": count,
        "events": events,
        "window": window,
        "patience": patience,
        "stuck": stuck,
        "stuck_target": asdict(stuck_target or target),
    }
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        try:
            # Not on the command line, which everybody can read: there may be a token in it.
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            yield Readers(process, count)
        finally:
            process.kill()


def raise_descriptors() -> int:
    """Let this process, and those it starts, have as many descriptors as they may; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# --- in the process of its own ------------------------------------------------------------------------------


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


def _connect(target: Target, *, small: bool = False) -> socket.socket:
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    sock.connect(("127.0.0.1", target.port))
    sock.sendall(target.request())
    return sock


def _open(target: Target, count: int, window: int) -> list[socket.socket]:
    """Return connections whose stream has begun, in the order in which they were opened."""
    poll = select.epoll()
    waiting: set[int] = set()
    sockets: list[socket.socket] = []
    by_number: dict[int, socket.socket] = {}
    while len(sockets) < count or waiting:
        while len(sockets) < count and len(waiting) < window:
            sock = _connect(target)
            sockets.append(sock)
            by_number[sock.fileno()] = sock
            waiting.add(sock.fileno())
            poll.register(sock, select.EPOLLIN)
        for number, _ in poll.poll():
            first = by_number[number].recv(65_536)
            assert first.startswith(b"HTTP/1.1 200"), first
            poll.unregister(number)
            waiting.discard(number)
    poll.close()
    return sockets


def _listen(sockets: list[socket.socket], events: int, patience: float) -> Heard:
    poll = select.epoll()
    buffer = bytearray(_BUFFER)
    mark = MARK[0]
    receive = {sock.fileno(): sock.recv_into for sock in sockets}
    counts = dict.fromkeys(receive, 0)
    unread = {sock.fileno(): b"" for sock in sockets[::STRIDE]}
    made: list[float] = []
    late: list[float] = []
    for sock in sockets:
        poll.register(sock, select.EPOLLIN)
    left = len(sockets) if events else 0
    last = 0.0
    began = time.process_time()
    while left and (ready := poll.poll(patience)):
        for number, _ in ready:
            size = receive[number](buffer)
            if number in unread:
                now = time.time()
                data = unread[number] + buffer[:size]
                stamps = [float(stamp) for stamp in _STAMP.findall(data)]
                made += stamps
                late += [now - stamp for stamp in stamps]
                unread[number] = data[data.rfind(b"\n") + 1 :]
            counts[number] = seen = counts[number] + buffer.count(mark, 0, size)
            if seen >= events or not size:
                poll.unregister(number)
                left -= 1
        last = time.time()
    if left:
        last -= patience
    deliveries = sum(min(seen, events) for seen in counts.values())
    late.sort()
    return Heard(
        deliveries=deliveries,
        missing=events * len(sockets) - deliveries,
        extra=sum(counts.values()) - deliveries,
        seconds=last - min(made, default=last),
        p50=late[len(late) // 2] if late else 0.0,
        p99=late[int(len(late) * 0.99)] if late else 0.0,
        busy=time.process_time() - began,
    )


def main() -> None:
    """Read an order from stdin; say when all is open, then what was heard; stay until killed."""
    raise_descriptors()
    order = json.loads(sys.stdin.readline())
    silent = [_connect(Target(**order["stuck_target"]), small=True) for _ in range(order["stuck"])]
    began = time.monotonic()
    sockets = _open(Target(**order["target"]), order["count"], order["window"])
    _say(time.monotonic() - began)
    _say(asdict(_listen(sockets, order["events"], order["patience"])))
    sys.stdin.read()
    for sock in [*silent, *sockets]:
        sock.close()


if __name__ == "__main__":
    main()
