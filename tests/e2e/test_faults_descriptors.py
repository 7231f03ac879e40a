"""No descriptor left: nobody dies of it, nobody burns a core, and it goes on when there are some again."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.helpers import SseEvent, Tree, eventually

#: Seconds without descriptors.
SHORT = 5.0

#: Share of one core that a process may use while it has none.
BUSY = 0.5


def numbers(pid: int) -> list[int]:
    """Return the descriptors of a process.

    Gateway and supervisor hide theirs from all but root; for another user they are taken to be as many as they are
    on this tree, and a leak is root's to find.
    """
    with contextlib.suppress(PermissionError):
        return sorted(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
    return list(range(70))


def descriptors(pid: int) -> int:
    return len(numbers(pid))


@contextmanager
def at_most(pid: int, number: int) -> Iterator[None]:
    """Let a process have descriptors below `number` only; those above stay open."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def idle_cpu(*pids: int) -> Iterator[None]:
    """Fail when one of the processes uses more than BUSY of a core during the block."""
    processes = [psutil.Process(pid) for pid in pids]
    begin, before = time.monotonic(), [sum(process.cpu_times()[:2]) for process in processes]
    yield
    took = time.monotonic() - begin
    for process, used in zip(processes, before, strict=True):
        share = (sum(process.cpu_times()[:2]) - used) / took
        assert share < BUSY, f"{process.name()} used {share:.2f} of a core"


@pytest.fixture
def tree() -> Iterator[Tree]:
    with Tree(runners=3) as tree:
        yield tree


def connect(tree: Tree) -> socket.socket:
    parts = urlsplit(tree.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def follow(tree: Tree, run: str, seen: list[SseEvent], attached: threading.Event) -> None:
    with tree.stream(run, timeout=30) as response:
        attached.set()
        seen.extend(response.events())  # one by one, as they come


def test_a_gateway_without_descriptors(tree: Tree) -> None:
    """Open streams go on, as do runs over open connections; new connections wait or are refused, then are served."""
    pid = tree.child("gateway").pid
    seen: list[SseEvent] = []
    attached = threading.Event()
    run = tree.submit("proj.count", n=800, delay=0.01)["id"]
    with ThreadPoolExecutor(1) as threads, contextlib.ExitStack() as stack:
        following = threads.submit(follow, tree, run, seen, attached)
        assert attached.wait(10)
        eventually(lambda: len(seen) > 20, 10, "events")
        leaked = descriptors(pid)
        # Four for the runner that replaces one: its three ends, and what a read of the store opens.
        with at_most(pid, max(numbers(pid)) + 5), idle_cpu(pid):
            before, end = len(seen), time.monotonic() + SHORT
            crowd = [stack.enter_context(connect(tree)) for _ in range(30)]
            while time.monotonic() < end:
                time.sleep(0.1)
                tree.snapshot(run)
            assert len(seen) > before + 100, "the stream went on"
        asked = [ask(tree, sock) for sock in crowd]
        assert set(asked) <= {b"200", b"503", b""}, "each was served, refused or closed"
        eventually(lambda: ask(tree, stack.enter_context(connect(tree))) == b"200", 10, "it serves again")
        following.result(timeout=40)
    assert [int(event.id) for event in seen] == list(range(1, 803))
    assert tree.child("gateway").pid == pid, "it lives"
    eventually(lambda: descriptors(pid) <= leaked + 4, 10, "nothing leaks")


def ask(tree: Tree, sock: socket.socket) -> bytes:
    """Return the status of a request over this connection; b"" when it was closed."""
    with contextlib.suppress(OSError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return sock.recv(65536).partition(b" ")[2][:3]
    return b""


def test_a_supervisor_without_descriptors(tree: Tree) -> None:
    """No runner can be made: runs wait. The tree lives, and makes runners when there are descriptors again."""
    gateway = tree.child("gateway").pid
    run = tree.submit("proj.count", n=1000, delay=0.01)["id"]
    eventually(lambda: tree.snapshot(run)["status"] == "RUNNING", 10, "a run at work")
    leaked = descriptors(tree.pid)
    waiting: list[Any] = []
    with at_most(tree.pid, 10), idle_cpu(tree.pid, gateway):
        end = time.monotonic() + SHORT
        while time.monotonic() < end:
            waiting.append(tree.submit("proj.echo", value=len(waiting))["id"])
            time.sleep(0.1)
        states = {tree.snapshot(id)["status"] for id in waiting}
        assert states == {"READY", "SUCCESSFUL"}, "those that found a runner are done, the others wait"
        assert tree.snapshot(run)["status"] == "RUNNING"
    for id in waiting:
        assert tree.wait(id, 60)["status"] == "SUCCESSFUL"
    assert tree.wait(run, 30)["status"] == "SUCCESSFUL"
    assert tree.child("gateway").pid == gateway
    eventually(lambda: descriptors(tree.pid) <= leaked + 8, 10, "nothing leaks")
