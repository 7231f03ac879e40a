"""How much the gateway grows while much goes through it, with one subscriber that reads, one that does not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.bench.figures import Figure, at_most, figure
from tests.bench.registry import benchmark
from tests.bench.trees import RUNNERS, await_idle, demo_tree
from tests.helpers import Tree, eventually

MIB = 1024 * 1024

#: Bytes of one event's data: a page of JSON. At 200 bytes the same amount takes five times as long.
SIZE = 2_000

#: What goes through before anything is measured: caches, pages, the store's statements.
WARM_UP = 8 * MIB

#: Seconds between two looks at the gateway's memory.
LOOK = 0.02

#: Seconds for one whole stream.
_PATIENCE = 120.0


class Memory:
    """The resident size of a process, looked at again and again, as a context manager.

    Attributes:
      before, most: bytes, at the beginning, at the worst.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.before = self.most = self._process.memory_info().rss

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._over.wait(LOOK):
                self.most = max(self.most, self._process.memory_info().rss)


@contextmanager
def stuck(tree: Tree, run: str) -> Iterator[None]:
    """Have somebody follow a run who does not read, again as soon as the gateway has had enough of it."""
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                ask(sock, tree, run)
                while not (over.wait(0.1) or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    pass

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        eventually(lambda: tree.snapshot(run)["subscribers"] >= 1, 10, "the subscriber that does not read")
        yield
    finally:
        over.set()
        thread.join()


def ask(sock: socket.socket, tree: Tree, run: str) -> None:
    """Send the request for a stream."""
    target = urllib.parse.urlsplit(tree.url)
    lines = [
        f"GET /api/v1/runs/{run}/events HTTP/1.1",
        "Host: localhost",
        "Accept: text/event-stream",
        f"Authorization: Bearer {tree.token()}",
    ]
    sock.connect((target.hostname or "", target.port or 0))
    sock.sendall("\r\n".join([*lines, "", ""]).encode())


def flood(tree: Tree, size: int) -> float:
    """Send `size` bytes of events through the gateway, to a reader and beside a stuck one; return the seconds.

    Raises:
      AssertionError: the reader has not got every byte.
    """
    await_idle(tree, RUNNERS)
    events = size // SIZE
    started = time.monotonic()
    run = tree.submit("demo.flood", n=events, size=SIZE)["id"]
    found, tail = 0, b""
    with stuck(tree, run), tree.stream(run, timeout=_PATIENCE) as stream:
        while data := stream.read():
            found += len(data)
            tail = (tail + data)[-4096:]
    assert found > events * SIZE, "the reader has every event"
    assert b"\nevent: stream.end\n" in tail
    return time.monotonic() - started


def growth(size: int) -> tuple[int, float]:
    """Return by how many bytes the gateway grew at most while `size` bytes went through, and how long they took."""
    with demo_tree() as tree:
        flood(tree, WARM_UP)
        with Memory(tree.child("gateway").pid) as memory:
            seconds = flood(tree, size)
        return memory.most - memory.before, seconds


@benchmark("memory", repetitions=1)
def run(repetitions: int) -> list[Figure]:
    """200 MB of events past a subscriber that reads, one that is stuck: how much the gateway grows"""
    return measure(repetitions, 200_000_000)


def measure(repetitions: int, size: int) -> list[Figure]:
    """Measure on a fresh tree each time."""
    found = [growth(size) for _ in range(repetitions)]
    return [
        figure(
            "gateway: growth at the worst",
            "MB",
            [max(1, most) / 1e6 for most, _ in found],
            at_most(20.0, 1.0),
        ),
        figure("events through the gateway", "MB/s", [size / seconds / 1e6 for _, seconds in found]),
    ]
