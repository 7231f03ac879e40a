"""Twenty open streams and SIGTERM: all end in their order, and so does the tree."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import RawResponse, SseEvent, Tree, eventually

STREAMS = 20

#: The acceptance line; the server that this one follows never ended while a stream was open.
WITHIN = 2.0

#: Events, of some 200 bytes, that no buffer between the gateway and a client that does not read can take.
FILLED = 3_000


def test_twenty_streams_end_cleanly_and_at_once(
    tmp_state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a client that says nothing, one that does not read, one that is in the middle of a request."""
    with Tree(tmp_state_dir, runners=4) as tree, ThreadPoolExecutor(STREAMS) as threads:
        runs = [tree.submit("proj.apatient")["id"] for _ in range(3)]
        runs.append(tree.submit("proj.count", n=1_000_000, delay=0.0001)["id"])
        streams = [tree.stream(run) for _, run in zip(range(STREAMS), itertools.cycle(runs), strict=False)]
        for run in runs:
            eventually(
                lambda run=run: tree.snapshot(run)["subscribers"] == STREAMS / len(runs), 10, "subscribers"
            )
        others = [awkward(tree, data) for data in awkward_beginnings(tree, runs[-1])]
        said = tree.snapshot(runs[-1])["offsets"]["last"]
        try:
            readers = [threads.submit(read_to_the_end, stream) for stream in streams]
            eventually(
                lambda: tree.snapshot(runs[-1])["offsets"]["last"] > said + FILLED,
                20,
                "a client that is stuck",
            )
            started = time.monotonic()
            os.kill(tree.pid, signal.SIGTERM)
            ends = [reader.result(30) for reader in readers]
            code = tree.process.wait(15)
        finally:
            for other in others:
                other.close()
    assert code == 0
    slowest = max(over for _, over in ends) - started
    with capsys.disabled():
        print(f"\nRECORD {STREAMS} streams ended within {slowest * 1000:.0f} ms of SIGTERM")
    for stream, (events, over) in zip(streams, ends, strict=True):
        assert over - started < WITHIN, f"a stream ended {over - started:.1f} s after SIGTERM"
        assert len(stream.decoder.retries) == 2, "one at the beginning, one to come back with"
        assert all(event.type != "stream.end" for event in events), "the runs go on at the next start"


def read_to_the_end(stream: RawResponse) -> tuple[list[SseEvent], float]:
    """Return the events, and when the last chunk came; http.client raises when it does not."""
    with stream:
        return list(stream.events()), time.monotonic()


def awkward_beginnings(tree: Tree, flood: str) -> list[bytes]:
    follow = f"GET /api/v1/runs/{flood}/events HTTP/1.1\r\nHost: x.localhost\r\nAuthorization: Bearer {tree.token()}"
    return [b"", follow.encode() + b"\r\n\r\n", b"POST /api/v1/runs HTTP/1.1\r\nHost: x.loc"]


def awkward(tree: Tree, data: bytes) -> socket.socket:
    target = urllib.parse.urlsplit(tree.url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect((target.hostname or "", target.port or 0))
    sock.sendall(data)
    return sock
