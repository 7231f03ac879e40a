"""What one connection can do to the gateway, with a stream open beside it that must not notice.

Sources: STREAMING §2.2 of the design's references (what hypercorn 0.18 dies of), RFC 9112 §11 (smuggling, splitting),
CVE lists of other servers. Beside all of it stand ten thousand connections that never finish a request.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import resource
import shutil
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.edges.listeners import Helper, new_folder
from tests.edges.trees import edge_tree
from tests.helpers import SseEvent, Tree, eventually

#: Connections that never finish a request; fewer where the machine has no descriptors for them.
CROWD = 10_000

#: Seconds between two events of the stream beside, and how long it may be silent: what two busy cores explain.
PAUSE = 0.02
LARGEST_GAP = 2.0

#: Seconds within which an attacked server has to have made up its mind.
PATIENCE = 10.0

HOST = "Host: localhost"
CLOSE = "Connection: close"
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"task":"proj.echo"}'


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1") + body


def get(*headers: str, target: str = "/health") -> bytes:
    return request(f"GET {target} HTTP/1.1", HOST, *headers)


def post(*headers: str, body: bytes = BODY, close: bool = True) -> bytes:
    """Return a submission; {TOKEN} is filled in later."""
    usual = (HOST, "Authorization: Bearer {TOKEN}", "Content-Type: application/json")
    return request("POST /api/v1/runs HTTP/1.1", *usual, *headers, *((CLOSE,) if close else ()), body=body)


def sized(body: bytes) -> bytes:
    return post(f"Content-Length: {len(body)}", body=body)


def chunked(body: bytes, *headers: str) -> bytes:
    return post("Transfer-Encoding: chunked", *headers, body=body)


DRIPPING = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY + b" " * 20_000) + b"0\r\n\r\n"
ONE_CHUNK = b"14\r\n" + BODY + b"\r\n0\r\n\r\n"

#: What is sent, and the statuses that come back: an empty tuple where no answer is owed.
ATTACKS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    # -- HTTP/2 where none is spoken
    "h2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
    "h2 frames": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" * 1000, (505,)),
    "h2c": (get("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"), (200,)),
    "h2c with a body": (post("Content-Length: 20", "Connection: Upgrade", "Upgrade: h2c"), (202,)),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500, (400,)),
    # -- WebSocket: frames before anybody has agreed to any
    "websocket frames too early": (
        get("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==") + b"\x81\x85\0\0\0\0hello" * 50, (404,)),
    # -- smuggling: two servers must not see two different requests
    "CL and TE": (post("Content-Length: 6", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED), (400,)),
    "TE and CL": (post("Transfer-Encoding: chunked", "Content-Length: 6", body=b"0\r\n\r\n" + SMUGGLED), (400,)),
    "two CL": (post("Content-Length: 20", "Content-Length: 5", body=BODY + SMUGGLED), (400,)),
    "one CL twice": (post("Content-Length: 20", "Content-Length: 20"), (202,)),
    "CL with a sign": (post("Content-Length: +20", body=BODY + SMUGGLED), (400,)),
    "CL below 0": (post("Content-Length: -1", body=BODY + SMUGGLED), (400,)),
    "CL in hex": (post("Content-Length: 0x14", body=BODY + SMUGGLED), (400,)),
    "CL of 5000 digits": (post("Content-Length: " + "9" * 5000), (400,)),
    "TE in HTTP/1.0": (chunked(b"0\r\n\r\n" + SMUGGLED).replace(b"HTTP/1.1", b"HTTP/1.0", 1), (400,)),
    "TE unknown": (post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED), (501,)),
    "TE identity": (post("Transfer-Encoding: identity", body=b"0\r\n\r\n" + SMUGGLED), (501,)),
    "TE twice": (post(*["Transfer-Encoding: chunked"] * 2, body=b"0\r\n\r\n" + SMUGGLED), (501,)),
    "TE behind a control character": (post("Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n" + SMUGGLED), (400,)),
    "space before the colon": (post("Content-Length : 20", body=BODY + SMUGGLED), (400,)),
    "a folded header": (get("X-Folded: a\r\n b: c", CLOSE), (200,)),
    "a folded first header": (request("GET /health HTTP/1.1", " X: y", HOST), (400,)),
    "bare LF": (b"GET /health HTTP/1.1\nHost: localhost\nConnection: close\n\n", (200,)),
    "bare CR": (get("X: a\rY: b", CLOSE), (400,)),
    "NUL in a header": (get("X: a\0b", CLOSE), (400,)),
    "a request behind the last one": (get(CLOSE) + SMUGGLED, (200,)),
    "garbage behind the last one": (post("Content-Length: 20", body=BODY + b"\r\n\0\xff" * 10_000), (202,)),
    # -- chunks
    "one-byte chunks": (chunked(DRIPPING), (202,)),
    "spaces behind a chunk's size": (chunked(ONE_CHUNK.replace(b"14\r", b"14 \r")), (202,)),
    "a chunk's size with a sign": (chunked(b"-5\r\n" + BODY), (400,)),
    "a chunk's size as 0x": (chunked(b"0x14\r\n" + BODY), (400,)),
    "a chunk's size of 100 zeros": (chunked(b"0" * 100 + ONE_CHUNK), (400,)),
    "a chunk longer than said": (chunked(b"5\r\n" + BODY), (400,)),
    "an endless chunk extension": (chunked(b"14;" + b"x" * 100_000 + b"\r\n" + BODY), (431,)),
    "LF in a chunk extension": (chunked(b"14;\n" + ONE_CHUNK[4:]), (400,)),
    "trailers": (chunked(ONE_CHUNK[:-2] + b"X-T: 1\r\nContent-Length: 99\r\nAuthorization: no\r\n\r\n"), (202,)),
    "a bomb of trailers": (chunked(ONE_CHUNK[:-2] + b"X-T: 1\r\n" * 20_000 + b"\r\n"), (431,)),
    "more than a body may be": (chunked(b"ffffff\r\n" + b" " * 2_000_000), (413,)),
    # -- heads
    "2000 headers": (get(*[f"X-{n}: 1" for n in range(2000)]), (431,)),
    "a header of 1 MB": (get("X: " + "x" * 1_000_000), (431,)),
    "a target of 100 kB": (get(target="/" + "x" * 100_000), (431,)),
    "a method of 5 kB": (request("X" * 5000 + " /health HTTP/1.1", HOST, CLOSE), (405,)),
    "no host": (request("GET /health HTTP/1.1", CLOSE), (400,)),
    "two hosts": (get("Host: evil.example", CLOSE), (400,)),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400,)),
    "HTTP/9.9": (request("GET /health HTTP/9.9", HOST), (505,)),
    "Expect": (post("Content-Length: 20", "Expect: 100-continue"), (100, 202)),
    "an unknown Expect": (post("Content-Length: 20", "Expect: 200-ok"), (202,)),
    # -- targets, methods
    "absolute form": (get(CLOSE, target="http://localhost/health"), (200,)),
    "absolute form of another host": (get(CLOSE, target="http://evil.example/health"), (421,)),
    "absolute form of a user": (get(CLOSE, target="http://me@localhost/health"), (400,)),
    "another scheme": (get(CLOSE, target="ftp://localhost/health"), (400,)),
    "no slash": (get(CLOSE, target="health"), (400,)),
    "two slashes": (get(CLOSE, target="//evil.example/health"), (404,)),
    "up and up": (get(CLOSE, target="/../../../etc/passwd"), (404,)),
    "a star": (get(CLOSE, target="*"), (400,)),
    "OPTIONS of a star": (request("OPTIONS * HTTP/1.1", HOST, CLOSE), (404,)),
    "CONNECT": (request("CONNECT example.com:443 HTTP/1.1", "Host: example.com:443", CLOSE), (400,)),
    "TRACE": (request("TRACE /health HTTP/1.1", HOST, CLOSE), (405,)),
    "a method in small letters": (request("get /health HTTP/1.1", HOST, CLOSE), (501,)),
    # -- bytes that are no UTF-8
    "escaped bytes in a path": (get("Authorization: Bearer {TOKEN}", CLOSE, target="/api/v1/runs/%ff%fe"), (404,)),
    "bytes in a path": (get("Authorization: Bearer {TOKEN}", CLOSE, target="/api/v1/runs/\xff\xfe"), (400,)),
    "NUL in a path": (get("Authorization: Bearer {TOKEN}", CLOSE, target="/api/v1/runs/%00"), (404,)),
    "bytes in a query": (get("Authorization: Bearer {TOKEN}", CLOSE, target="/api/v1/runs?tag=%ff%00"), (200,)),
    "bytes in a token": (get("Authorization: Bearer \xff\xfe", CLOSE, target="/api/v1/runs"), (401,)),
    "bytes in a cookie": (get("Cookie: bulkhead_token=\xff; =;;\x80", CLOSE, target="/api/v1/runs"), (401,)),
    "bytes in a host": (request("GET /health HTTP/1.1", "Host: \xff", CLOSE), (400,)),
    "bytes in a cursor": (
        get("Authorization: Bearer {TOKEN}", "Last-Event-ID: \xff", CLOSE, target="/api/v1/runs/{RUN}/events"), (400,)),
    "bytes in Accept": (
        get("Authorization: Bearer {TOKEN}", "Accept: \xff", CLOSE, target="/api/v1/runs/{RUN}/events"), (406,)),
    "bytes in a body": (sized(b"\xff\xfe\0{"), (400,)),
    "half a surrogate in a body": (sized(b'{"task":"proj.\\ud800"}'), (400,)),
    "a deep body": (sized(b"[" * 200_000), (400,)),
}  # fmt: skip


# -- the stream beside --------------------------------------------------------------------------------------


@dataclass
class Bystander:
    """A thread that follows a run on one connection, which must never break."""

    tree: Tree
    run: str
    seen: list[SseEvent] = field(default_factory=list)
    ended: str = ""
    leaving: bool = False

    def follow(self) -> None:
        try:
            with self.tree.stream(self.run, timeout=60) as stream:
                for event in stream.events():
                    self.seen.append(event)
                    if self.leaving:
                        return
            self.ended = "its stream ended"
        except Exception as error:  # shown by whoever looks
            self.ended = repr(error)

    def check(self, since: int) -> None:
        """Fail unless it has heard of everything since then, without a long silence, and still does."""
        now = len(self.seen)
        eventually(lambda: self.ended or len(self.seen) > now + 3, 10, "the next events of the stream beside")
        assert not self.ended, self.ended
        events = self.seen[max(0, since - 1) :]
        assert [int(event.id) for event in events] == list(
            range(int(events[0].id), int(events[0].id) + len(events))
        )
        gap = max(after.at - before.at for before, after in itertools.pairwise(events))
        assert gap < LARGEST_GAP, f"silent for {gap:.2f} s"


@pytest.fixture(scope="module")
def crowd_size() -> Iterator[int]:
    """Give how many connections this machine allows; the trees made meanwhile may have all its descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield min(CROWD, before[1] * 3 // 4 - 2000)  # the gateway gives connections three quarters
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def tree(crowd_size: int) -> Iterator[Tree]:
    """Give a tree with room for the crowd, and for those who come beside it."""
    with edge_tree({"connections": crowd_size + 2000}) as tree:
        yield tree


@pytest.fixture(scope="module")
def stream(tree: Tree) -> Iterator[Bystander]:
    """Give the stream beside."""
    run = tree.submit("proj.count", n=1_000_000, delay=PAUSE)["id"]
    beside = Bystander(tree, run)
    thread = threading.Thread(target=beside.follow, daemon=True)
    thread.start()
    eventually(lambda: len(beside.seen) > 5, 10, "the stream beside")
    yield beside
    beside.leaving = True
    thread.join(10)
    tree.http.post(f"/api/v1/runs/{run}/cancel", json={"grace": 0})
    tree.wait(run)


@pytest.fixture(scope="module")
def crowd(tree: Tree, stream: Bystander, crowd_size: int) -> Iterator[Helper]:
    """Give the connections that never finish a request; they stand while everything else here happens."""
    target = urllib.parse.urlsplit(tree.url)
    folder = new_folder()
    try:
        script = ["-m", "tests.edges.half_open", target.hostname or "", str(target.port), str(crowd_size)]
        with Helper("crowd", [sys.executable, *script], greets=True, folder=folder) as helper:
            helper.said["at once"] = connections_of(tree)
            yield helper
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def unnoticed(stream: Bystander, crowd: Helper) -> Iterator[None]:
    """Look at the stream beside, before and after."""
    since = len(stream.seen)
    yield
    stream.check(since)


# -- clients ------------------------------------------------------------------------------------------------


def connect(tree: Tree) -> socket.socket:
    target = urllib.parse.urlsplit(tree.url)
    return socket.create_connection((target.hostname or "", target.port or 0), PATIENCE)


def abort(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def answer_to(tree: Tree, data: bytes) -> bytes:
    """Send bytes as fast as they are taken; return everything that comes until the server ends the connection."""
    found = b""
    with connect(tree) as sock:

        def send() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(data)

        sender = threading.Thread(target=send)
        sender.start()
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                found += part
        sender.join()
    return found


def statuses(answer: bytes) -> tuple[int, ...]:
    return tuple(int(status) for status in re.findall(rb"(?:^|\n|\}|OK)HTTP/1\.1 (\d{3})", answer))


def filled(tree: Tree, stream: Bystander, data: bytes) -> bytes:
    return data.replace(b"{TOKEN}", tree.token().encode()).replace(b"{RUN}", stream.run.encode())


def connections_of(tree: Tree) -> int:
    """Return how many sockets the gateway has: /proc/net shows them to everybody, /proc/PID/fd to root alone."""
    port = f":{urllib.parse.urlsplit(tree.url).port or 0:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    over = {"06", "07", "0A"}  # TIME_WAIT, CLOSE, LISTEN: nobody's socket, or not a connection's
    return sum(line[1].endswith(port) and line[3] not in over for line in lines)


# -- attacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "wanted"), ATTACKS.values(), ids=ATTACKS)
def test_it_is_answered_as_it_should(
    tree: Tree, stream: Bystander, data: bytes, wanted: tuple[int, ...]
) -> None:
    answer = answer_to(tree, filled(tree, stream, data))
    assert statuses(answer) == wanted, answer[-500:]
    if wanted[-1] >= 400:
        assert b"\r\ncontent-type: application/problem+json\r\n" in answer.lower()
        problem = json.loads(answer.rpartition(b"\r\n\r\n")[2])
        assert problem["status"] == wanted[-1]
        assert problem["type"].startswith("urn:bulkhead:problem:")


def test_a_flood_of_pipelined_requests_is_answered_in_order(tree: Tree) -> None:
    """hypercorn closes a connection after a thousand: the rest is nobody's."""
    answer = answer_to(tree, get() * 1500 + get(CLOSE))
    found = statuses(answer)
    assert 1000 <= len(found) <= 1001
    assert set(found) == {200}


def test_a_request_may_come_byte_by_byte(tree: Tree, stream: Bystander) -> None:
    data = filled(tree, stream, post("Content-Length: 20"))
    with connect(tree) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in data:
            sock.sendall(bytes([byte]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 202")


def test_a_body_without_a_token_is_not_waited_for(tree: Tree) -> None:
    """A slow body costs its sender a token; without one it is refused while it trickles."""
    with connect(tree) as sock:
        sock.sendall(request("POST /api/v1/runs HTTP/1.1", HOST, "Content-Length: 1000000", body=b"{"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 401")
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(b" ")
                time.sleep(0.1)
            raise AssertionError("the connection is still there after ten seconds")


def test_slow_bodies_of_those_who_have_a_token_harm_nobody(tree: Tree, stream: Bystander) -> None:
    head = filled(tree, stream, post("Content-Length: 1000", body=b"{", close=False))
    slow = [connect(tree) for _ in range(100)]
    try:
        for sock in slow:
            sock.sendall(head)
        for _ in range(10):
            for sock in slow:
                sock.sendall(b" ")
            assert answer_to(tree, get(CLOSE)).endswith(b"OK")
    finally:
        for sock in slow:
            sock.close()


def test_a_thousand_aborted_connections_leave_nothing(
    tree: Tree, stream: Bystander, rng: random.Random
) -> None:
    """Each with a stream, a second request behind it, a third one begun: what hypercorn keeps task and socket of."""
    follow = get("Authorization: Bearer {TOKEN}", target="/api/v1/runs/{RUN}/events?after=now")
    data = filled(tree, stream, follow + follow + b"GET /rest")
    before, subscribers = connections_of(tree), tree.snapshot(stream.run)["subscribers"]
    for _ in range(1000):
        sock = connect(tree)
        if rng.random() < 0.3:
            sock.sendall(data[: rng.randrange(1, len(data))])
        else:
            sock.sendall(data)
            if rng.random() < 0.3:
                sock.recv(1)
        abort(sock)
    eventually(
        lambda: tree.snapshot(stream.run)["subscribers"] == subscribers, 20, "nobody but the stream beside"
    )
    # The crowd may have become smaller meanwhile, never larger.
    eventually(lambda: connections_of(tree) <= before, 20, f"at most {before} connections")


def test_mutations_harm_nobody(tree: Tree, stream: Bystander, rng: random.Random) -> None:
    """Two hundred of the requests above, each changed at random; never a 500."""
    seeds = [filled(tree, stream, data) for data, _ in ATTACKS.values() if len(data) < 4000]
    for _ in range(200):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.choice(
                (b"", b"\r\n", b"\0", b"\xff", b": ", rng.randbytes(2))
            )
        with connect(tree) as sock, contextlib.suppress(OSError):
            sock.settimeout(5)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(OSError):
                while part := sock.recv(65536):
                    answer += part
            assert 500 not in statuses(answer), bytes(data)


def test_ten_thousand_half_open_connections_end_by_themselves(
    tree: Tree, stream: Bystander, crowd: Helper, crowd_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stood beside the tests above; what has brought no request after 15 s is ended."""
    assert crowd.said["opened"] == crowd_size
    eventually(
        lambda: crowd.ask(op="look")["ended"] == crowd_size, 60, "the end of all half-open connections"
    )
    eventually(lambda: connections_of(tree) < 100, 10, "the gateway's sockets to be gone")
    assert tree.child("gateway").restarts == 0, "one and the same gateway"
    assert answer_to(tree, get(CLOSE)).endswith(b"OK")
    with capsys.disabled():
        print(f"\nRECORD {crowd_size} half-open connections, {crowd.said['at once']} of them at once")
