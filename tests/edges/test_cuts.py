"""A stream that is cut a thousand times, each time at a random byte, adds up to exactly the run."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.helpers import SseDecoder, SseEvent, Tree

CUTS = 1000
EVENTS = 1000
CLIENTS = 8

#: Most bytes of one connection, head included: some fifteen events on average, and now and then not even the head.
BYTES = 6_000

#: Seconds between two events of a run that is followed while it runs.
PAUSE = 0.001


class Unchunked:
    """The body of an HTTP/1 answer whose bytes come anyhow; written here, since http.client waits for whole chunks."""

    def __init__(self) -> None:
        self._rest = b""
        self._chunked: bool | None = None
        self._left = 0
        self.status = 0

    def receive(self, data: bytes) -> bytes:
        """Take bytes as they came; return those of the body."""
        self._rest += data
        if self._chunked is None:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return b""
            self.status = int(head.split(b" ", 2)[1])
            self._chunked = b"transfer-encoding: chunked" in head.lower()
            self._rest = rest
        if not self._chunked:
            body, self._rest = self._rest, b""
            return body
        return b"".join(self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        while True:
            if self._left > 2:  # bytes of data before the chunk's own CRLF
                part = self._rest[: self._left - 2]
                self._rest, self._left = self._rest[len(part) :], self._left - len(part)
                yield part
            if self._left > 2 or len(self._rest) < self._left:
                return
            self._rest, self._left = self._rest[self._left :], 0
            size, end, rest = self._rest.partition(b"\r\n")
            if not end or size == b"0":
                return
            self._rest, self._left = rest, int(size, 16) + 2


@dataclass
class Client:
    """Follows runs over connections that it cuts."""

    url: str
    token: str
    rng: random.Random
    cuts: int = 0
    seen: list[SseEvent] = field(default_factory=list)

    def follow(self, run: str) -> None:
        """Follow a run to its end, cut by cut."""
        self.seen = []
        for _ in range(CUTS):
            if self.connect(run):
                return
            self.cuts += 1
        raise AssertionError(f"{CUTS} connections are not enough; {len(self.seen)} events")

    def connect(self, run: str) -> bool:
        """Read one connection to a random byte; return whether it came to the end."""
        target = urllib.parse.urlsplit(self.url)
        budget, decoder, body = self.rng.randrange(1, BYTES), SseDecoder(), Unchunked()
        with socket.create_connection((target.hostname, target.port or 0), 30) as sock:
            sock.sendall(self.request(run))
            while budget and (data := sock.recv(min(budget, 65536))):
                budget -= len(data)
                self.seen += decoder.receive(body.receive(data))
                assert body.status in (0, 200), body.status
                if self.seen and self.seen[-1].type == "stream.end":
                    return True
            assert not budget, "the server has ended a stream that goes on"
            if self.rng.random() < 0.5:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def request(self, run: str) -> bytes:
        lines = [
            f"GET /api/v1/runs/{run}/events HTTP/1.{self.rng.randrange(2)}",
            "Host: localhost",
            "Accept: text/event-stream",
            f"Authorization: Bearer {self.token}",
        ]
        if self.seen:
            lines.append(f"Last-Event-ID: {self.seen[-1].id}")
        return "\r\n".join([*lines, "", ""]).encode()


def same(events: list[SseEvent]) -> list[tuple[str, str, str]]:
    return [(event.id, event.type, event.data) for event in events]


def test_a_thousand_cuts_lose_and_repeat_nothing(plain_tree: Tree, seed: int) -> None:
    """Half of the clients follow one run that has ended, the others runs that speak meanwhile."""
    tree = plain_tree
    ended = tree.submit("proj.count", n=EVENTS)["id"]
    tree.wait(ended, 30)
    token = tree.token()
    clients = [Client(tree.url, token, random.Random(f"{seed}-{number}")) for number in range(CLIENTS)]

    def follow(client: Client, live: bool) -> int:
        followed = 0
        while not followed or sum(one.cuts for one in clients) < CUTS:
            run = tree.submit("proj.count", n=EVENTS, delay=PAUSE)["id"] if live else ended
            client.follow(run)
            assert [int(event.id) for event in client.seen] == list(range(1, EVENTS + 3))
            assert [event.json["step"] for event in client.seen[1:-1]] == list(range(1, EVENTS + 1))
            assert same(client.seen) == same(tree.events(run)), "the union is the run"
            followed += 1
        return followed

    with ThreadPoolExecutor(CLIENTS) as threads:
        followed = list(threads.map(follow, clients, itertools.cycle((True, False))))
    assert min(followed) >= 1
    assert sum(client.cuts for client in clients) >= CUTS
