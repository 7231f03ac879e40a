"""A thousand subscribers of one run, most of them alive: how late each event comes to them, and what it costs.

The crowd is a process of its own that only reads: one epoll loop, no parsing but for the time in each event.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.bench.figures import Figure, figure, ratio
from tests.bench.registry import benchmark
from tests.bench.trees import RUNNERS
from tests.helpers import ROOT, Tree, eventually

#: Subscribers, and how many of them stop reading in a round with stuck ones.
CROWD = 1_000
STUCK = 1

#: Events of a round, and seconds between two of them: 50 a second, as a busy progress bar.
EVENTS = 150
DELAY = 0.02

#: Bytes of an event's own data.
SIZE = 100

#: Events of 4,000 bytes that a stuck client is sent first: more than its small buffer and the gateway's take (300 KB).
BEFORE = 100
SMALL_BUFFER = 4_096

#: A crowd comes at once, with one token.
LIMITS = {"accepts_per_second": 100_000, "streams_per_token": 100_000}

_STAMP = re.compile(rb'"_timestamp":"([^"]+)"')
_PATIENCE = 120.0


def _read_crowd(port: int, path: str, token: str, count: int, stuck: int) -> dict[str, Any]:
    """Follow a stream `count` times, without reading on the first `stuck` connections; return what came when."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, count + 100), hard), hard))
    poll = select.epoll()
    open_sockets: dict[int, socket.socket] = {}
    silent = []
    for number in range(count):
        sock = socket.socket()
        if number < stuck:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        sock.connect(("127.0.0.1", port))
        # A stuck one begins with the history, so that it is stuck at once; the others with what is new.
        query = "" if number < stuck else "?after=now"
        sock.sendall(
            f"GET {path}{query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            "Accept: text/event-stream\r\n\r\n".encode()
        )
        if number < stuck:
            silent.append(sock)
            continue
        assert sock.recv(65536).startswith(b"HTTP/1.1 200"), "refused"
        sock.setblocking(False)
        open_sockets[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    print("ready", flush=True)
    late: list[float] = []
    received = 0
    while open_sockets:
        for fd, _ in poll.poll(_PATIENCE):
            data = open_sockets[fd].recv(262144)
            now = time.time()
            received += len(data)
            stamps = _STAMP.findall(data)
            late += [now - dt.datetime.fromisoformat(stamp.decode()).timestamp() for stamp in stamps]
            if not data or b"event: stream.end" in data:
                poll.unregister(fd)
                open_sockets.pop(fd).close()
    for sock in silent:
        sock.close()
    late.sort()
    return {
        "deliveries": len(late),
        "bytes": received,
        "p50": late[len(late) // 2],
        "p99": late[int(len(late) * 0.99)],
    }


@contextmanager
def _crowd(tree: Tree, run: str, token: str, count: int, stuck: int) -> Iterator[subprocess.Popen[str]]:
    port = tree.url.rpartition(":")[2]
    command = [sys.executable, "-m", "tests.bench.crowd", port, f"/api/v1/runs/{run}/events"]
    with subprocess.Popen(
        [*command, str(count), str(stuck)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin is not None
        process.stdin.write(token + "\n")  # not on the command line, which everybody can read
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def one_round(tree: Tree, count: int, stuck: int, events: int) -> dict[str, float]:
    """Have one task speak to a crowd; return latencies (seconds), CPU seconds and memory of the gateway."""
    gateway = psutil.Process(tree.child("gateway").pid)
    gate = tree.state_dir / "gate"
    gate.unlink(missing_ok=True)
    run = tree.submit("proj.paced", n=events, size=SIZE, delay=DELAY, before=BEFORE, gate=str(gate))
    eventually(lambda: tree.snapshot(run["id"])["offsets"]["last"] > BEFORE, 10.0, "a run")
    idle = gateway.memory_info().rss
    with _crowd(tree, run["id"], run["token"], count, stuck) as crowd:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == "ready\n"
        grown = gateway.memory_info().rss - idle
        began = gateway.cpu_times()
        gate.touch()
        answer = json.loads(crowd.stdout.readline())
        ended = gateway.cpu_times()
    spent = ended.user + ended.system - began.user - began.system
    return {**answer, "cpu": spent / answer["deliveries"], "grown": grown / count}


@benchmark("crowd", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """1,000 subscribers at 50 events/s, alternately all alive and one stuck: latency, CPU per delivery"""
    return measure(repetitions, CROWD, EVENTS)


def measure(repetitions: int, crowd: int, events: int) -> list[Figure]:
    """Measure so many pairs of rounds with so many subscribers and events."""
    alive: list[dict[str, float]] = []
    stuck: list[dict[str, float]] = []
    with Tree(runners=RUNNERS, env={"TASKKIT_LIMITS": json.dumps(LIMITS)}) as tree:
        one_round(tree, min(crowd, 100), 0, 50)
        for _ in range(repetitions):
            alive.append(one_round(tree, crowd, 0, events))
            stuck.append(one_round(tree, crowd, STUCK, events))
    name = f"{crowd} subscribers at {1 / DELAY:.0f} events/s"
    return [
        figure(f"{name}: p50", "ms", [one["p50"] * 1e3 for one in alive]),
        figure(f"{name}: p99", "ms", [one["p99"] * 1e3 for one in alive]),
        figure(f"{name}, {STUCK} of them stuck: p99", "ms", [one["p99"] * 1e3 for one in stuck]),
        ratio("p99 with a stuck one / without", [one["p99"] for one in stuck], [one["p99"] for one in alive]),
        figure("CPU of the gateway per delivery", "us", [one["cpu"] * 1e6 for one in alive]),
        figure("memory of the gateway per subscriber", "KB", [one["grown"] / 1e3 for one in alive]),
    ]


if __name__ == "__main__":
    print(
        json.dumps(
            _read_crowd(int(sys.argv[1]), sys.argv[2], sys.stdin.readline().strip(), *map(int, sys.argv[3:]))
        ),
        flush=True,
    )
