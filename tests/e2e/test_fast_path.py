"""FAST_PATH changes how bytes get to a subscriber, never which."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import SseDecoder, SseEvent, Tree, eventually

#: Subscribers that read, and what they read: 2.4 MB, more than any socket takes from one that does not.
CROWD = 12
EVENTS, SIZE, DELAY = 300, 8_000, 0.004


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "plain"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """Give a tree with the fast path, then one without."""
    with Tree(env={"TASKKIT_FAST_PATH": str(request.param).lower()}) as tree:
        yield tree


def is_fast(tree: Tree) -> bool:
    return tree.env["TASKKIT_FAST_PATH"] == "true"


def streams(tree: Tree) -> dict[str, int]:
    """Return what the hub counts."""
    counts: dict[str, int] = tree.http.get("/api/v1/stats").json()["streams"]
    return counts


def request(tree: Tree, run: str, version: str = "1.1") -> socket.socket:
    """Open a stream on a bare socket with a small receive buffer; nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", int(tree.url.rpartition(":")[2])))
    sock.sendall(
        f"GET /api/v1/runs/{run}/events HTTP/{version}\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {tree.token()}\r\n\r\n".encode()
    )
    return sock


def same(events: list[SseEvent]) -> list[tuple[str, str, str]]:
    return [(event.id, event.type, event.data) for event in events]


def test_a_crowd_with_one_that_is_stuck_sees_the_same(tree: Tree, tmp_path: Path) -> None:
    before = streams(tree)["fast_deliveries"]
    gate = tmp_path / "gate"
    run = tree.submit("proj.paced", n=EVENTS, size=SIZE, delay=DELAY, gate=str(gate))["id"]
    with request(tree, run) as stuck, ThreadPoolExecutor(CROWD) as clients:
        reading = [clients.submit(tree.events, run) for _ in range(CROWD)]
        # On a slow machine the run would be over before they are there: nothing would be live.
        eventually(lambda: streams(tree)["subscribers"] == CROWD + 1, 30.0, "everybody is there")
        gate.touch()
        seen = [one.result() for one in reading]
        assert streams(tree)["subscribers"] >= 1, "the stuck one is not let go yet"
        stuck.close()
    assert [int(event.id) for event in seen[0]] == list(range(1, EVENTS + 3))
    assert [event.json["number"] for event in seen[0][1:-1]] == list(range(1, EVENTS + 1))
    assert all(same(other) == same(seen[0]) for other in seen)
    assert same(tree.events(run)) == same(seen[0]), "live as in history"
    counts = streams(tree)
    delivered = counts["fast_deliveries"] - before
    assert (delivered > EVENTS) == is_fast(tree), delivered
    assert (counts["shortfalls"] > 0) == is_fast(tree), "the stuck one went over to its own task"
    eventually(lambda: streams(tree)["subscribers"] == 0, 10.0, "everybody has left")
    assert streams(tree)["riders"] == 0


def test_http_1_0_gets_the_bytes_without_chunks(tree: Tree) -> None:
    run = tree.submit("proj.paced", n=20, size=10, delay=0.02)["id"]
    data = b""
    with request(tree, run, "1.0") as sock:
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert not re.search(rb"^[0-9a-f]+\r$", body, re.MULTILINE)
    assert same(SseDecoder().receive(body)) == same(tree.events(run))


def test_a_client_that_leaves_in_the_middle_ends_only_its_own_stream(tree: Tree) -> None:
    run = tree.submit("proj.paced", n=100, size=100, delay=0.01)["id"]
    with tree.stream(run) as staying, tree.stream(run) as leaving:
        assert next(leaving.events()).type == "run.started"
        leaving.close()
        assert [int(event.id) for event in staying.events()] == list(range(1, 103))
