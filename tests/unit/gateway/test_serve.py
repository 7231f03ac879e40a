"""The server against raw clients on real sockets: what one of them does, the others must not notice."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PriorityFrame, SettingsFrame
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway.serve import Peer, ServeLimits, serve

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OK = b"HTTP/1.1 200"


# -- the application ----------------------------------------------------------------------------------------


@dataclass
class App:
    """An ASGI application with one path for each way to behave; remembers what its requests came to."""

    peers: list[Peer] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    cancelling: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # test_upgrade is about those
            await send({"type": "websocket.close"})
            return
        self.peers.append(scope["state"]["peer"])
        name = scope["path"].strip("/").replace("-", "_") or "hello"
        await getattr(self, f"on_{name}", self.on_missing)(scope, receive, send)
        self.seen.append(name)

    async def answer(self, send: Send, body: bytes, status: int = 200, close: bool = False) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def on_missing(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(send, b"no such page", 404)

    async def on_hello(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(send, b"hello")

    async def on_echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.append("disconnect")
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        await self.answer(send, body)

    async def on_early(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer before the body has been read, as for one that is too large, with a full inbox."""
        await trio.testing.wait_all_tasks_blocked(0.005)
        await self.answer(send, b"too large", 413)

    async def on_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(send, b"x" * 8_000_000)

    async def on_cancelled(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a long write cancelled, then finish the answer all the same."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with self.cancelling:
            await send({"type": "http.response.body", "body": b"x" * 8_000_000, "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    async def on_boom(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("boom")

    async def on_half(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("half")

    async def on_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._until_disconnect(receive, partial(self._ticks, send))

    async def on_flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._until_disconnect(receive, partial(self._flood, send))

    async def on_wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._until_disconnect(receive, trio.sleep_forever)

    async def on_deaf(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send on after the disconnect, without ever looking for it."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def on_ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Request(scope, receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert not await asked.is_disconnected()
        await send({"type": "http.response.body", "body": b"there", "more_body": True})
        while not await asked.is_disconnected():
            await trio.sleep(0.001)
        self.seen.append("gone")

    async def on_suicidal(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Cancel the scope of the final send as soon as the disconnect shows (STREAMING 2.2 j)."""
        await self._until_disconnect(receive, partial(self.answer, send, b"done"), wait=True)

    async def _until_disconnect(
        self, receive: Receive, speak: Callable[[], Awaitable[None]], wait: bool = False
    ) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.seen.append("disconnect")
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await speak()
            if wait:
                await trio.sleep_forever()

    async def _ticks(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
            await trio.sleep(0.01)

    async def _flood(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})


# -- the harness --------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A server under test."""

    app: App
    listener: socket.socket
    shutdown: trio.Event
    ended: trio.Event
    port: int

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    return sock


@asynccontextmanager
async def serving(
    app: App | None = None,
    *,
    grace: float = 0.5,
    sock: socket.socket | None = None,
    state: Mapping[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[Running]:
    """Serve `app`; shut down at the end, which has to come about within 5 s of the grace."""
    app = app or App()
    with trio.fail_after(30):
        listener = sock or listening()
        try:
            port = 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1]
            running = Running(app, listener, trio.Event(), trio.Event(), port)

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve(
                    app,
                    [listener],
                    limits=ServeLimits(**limits),
                    shutdown=running.shutdown,
                    grace=grace,
                    state={} if state is None else state,
                    task_status=task_status,
                )
                running.ended.set()

            async with trio.open_nursery() as nursery:
                await nursery.start(run)
                yield running
                running.shutdown.set()
                with trio.fail_after(grace + 5):
                    await running.ended.wait()
        finally:
            if sock is None:
                listener.close()


def request(path: str = "/hello", *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Return what comes until end of file or RST, within 5 s."""
    data = b""
    with trio.fail_after(5):
        try:
            async for part in stream:
                data += part
        except trio.BrokenResourceError:
            pass
    return data


async def drop_all(stream: trio.SocketStream) -> None:
    """Read until end of file; raise trio.BrokenResourceError on RST."""
    with trio.fail_after(5):
        async for _ in stream:
            pass


async def read_until(stream: trio.SocketStream, mark: bytes) -> bytes:
    data = b""
    with trio.fail_after(5):
        while mark not in data:
            part = await stream.receive_some()
            assert part, f"end of file after {data!r}"
            data += part
    return data


async def ask(running: Running, data: bytes) -> bytes:
    """Send `data` on a connection of its own; return everything that comes back."""
    async with await running.connect() as stream:
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # refused before it was all out; the answer may still be there
        return await read_to_end(stream)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, at most 5 s."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def abort(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@asynccontextmanager
async def bystander(running: Running) -> AsyncIterator[None]:
    """Follow /stream meanwhile; fail unless bytes kept coming, and still come afterwards."""
    gaps: list[float] = []
    stopping = False

    async def follow() -> None:
        last = trio.current_time()
        async for _ in stream:
            now = trio.current_time()
            gaps.append(now - last)
            last = now
        assert stopping, "the bystander's stream ended"

    async with await running.connect() as stream, trio.open_nursery() as nursery:
        await stream.send_all(request("/stream"))
        nursery.start_soon(follow)
        await eventually(lambda: len(gaps) > 2)
        yield
        reached = len(gaps)
        await eventually(lambda: len(gaps) > reached + 2)
        stopping = True
        nursery.cancel_scope.cancel()
    assert max(gaps) < 2.0  # the tick is 10 ms; two busy cores explain a second at most


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# -- what works ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_errors")
class TestHttp:
    async def test_an_answer_of_the_application_arrives(self) -> None:
        async with serving() as running:
            answer = await ask(running, request("/hello", "Connection: close"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(OK)
        assert body == b"hello"
        assert b"server:" not in head.lower()

    async def test_an_error_of_the_application_arrives(self) -> None:
        async with serving() as running:
            answer = await ask(running, request("/nowhere", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 404")
        assert answer.endswith(b"no such page")

    async def test_http_1_0_gets_its_answer_and_the_end(self) -> None:
        async with serving() as running:
            assert (await ask(running, request(version="1.0"))).endswith(b"hello")
        assert running.app.peers[0].http_version == "1.0"

    async def test_http_1_0_streams_are_not_chunked(self) -> None:
        async with serving() as running, await running.connect() as stream:
            await stream.send_all(request("/stream", version="1.0"))
            head, _, body = (await read_until(stream, b"tick\ntick\n")).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body.startswith(b"tick\n")

    async def test_a_connection_is_kept_alive(self) -> None:
        async with serving() as running, await running.connect() as stream:
            for _ in range(3):
                await stream.send_all(request())
                assert (await read_until(stream, b"hello")).startswith(OK)
        assert len({peer.client for peer in running.app.peers}) == 1

    async def test_pipelined_requests_are_answered_in_order(self) -> None:
        async with serving() as running, await running.connect() as stream:
            await stream.send_all(request() + request("/nowhere") + request("/hello", "Connection: close"))
            answer = await read_to_end(stream)
        assert answer.count(b"HTTP/1.1 200") == 2
        assert answer.index(b"hello") < answer.index(b"no such page") < answer.rindex(b"hello")

    async def test_a_body_comes_through_whole(self) -> None:
        body = random.Random(1).randbytes(3_000_000)
        head = request("/echo", f"Content-Length: {len(body)}", "Connection: close", method="POST")
        async with serving() as running, await running.connect() as stream:
            received = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, head + body)
                received = await read_to_end(stream)
        assert received.partition(b"\r\n\r\n")[2] == body

    async def test_a_client_may_ask_before_it_sends_the_body(self) -> None:
        async with serving() as running, await running.connect() as stream:
            head = request("/echo", "Content-Length: 4", "Expect: 100-continue", method="POST")
            await stream.send_all(head)
            await read_until(stream, b"HTTP/1.1 100")
            await stream.send_all(b"body")
            assert (await read_until(stream, b"\r\n\r\nbody")).startswith(OK)

    async def test_an_early_answer_outruns_the_body(self) -> None:
        # With hypercorn's own queue the application never gets out of its final send here (0.18, measured).
        async with serving() as running, bystander(running):
            head = request("/early", "Content-Length: 4000000", method="POST")
            answer = b""
            async with await running.connect() as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, head + b"x" * 4_000_000)
                with trio.fail_after(5):
                    async for part in stream:  # and ends with FIN: RST could overtake the answer
                        answer += part
        assert answer.startswith(b"HTTP/1.1 413")
        assert answer.endswith(b"too large")
        assert "early" in running.app.seen

    async def test_an_answer_before_the_end_of_its_request_says_that_it_is_the_last(self) -> None:
        async with serving() as running, await running.connect() as stream:
            await stream.send_all(request("/nowhere", "Content-Length: 9", method="POST") + b"whole one")
            kept = await read_until(stream, b"no such page")
            await stream.send_all(request("/nowhere", "Content-Length: 9", method="POST") + b"half")
            last = await read_to_end(stream)
        assert b"connection: close" not in kept.lower()
        assert b"connection: close" in last.lower()

    async def test_the_application_finds_its_peer(self) -> None:
        async with serving(state={"engine": 1}) as running, await running.connect() as stream:
            await stream.send_all(request("/wait"))
            await eventually(lambda: bool(running.app.peers))
            (peer,) = running.app.peers
            assert peer.client == stream.socket.getsockname()
            assert peer.http_version == "1.1"
            assert os.readlink(f"/proc/self/fd/{peer.fileno()}").startswith("socket:")
            peer.abort()
            with pytest.raises(trio.BrokenResourceError) as caught:
                await stream.receive_some()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            await eventually(lambda: running.app.seen == ["disconnect", "wait"])
            assert peer.fileno() == -1
            peer.abort()

    async def test_a_unix_socket_works(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "http"))
            sock.listen()
            async with serving(sock=sock) as running:
                async with await trio.open_unix_socket(tmp_path / "http") as stream:
                    await stream.send_all(request())
                    await read_until(stream, b"hello")
        assert running.app.peers[0].client is None


# -- what clients may try -----------------------------------------------------------------------------------


def h2_frames(*frames: Frame) -> bytes:
    return PREFACE + SettingsFrame(0).serialize() + b"".join(frame.serialize() for frame in frames)


def h2_request(*headers: tuple[bytes, bytes], end: bool = True) -> HeadersFrame:
    usual = {b":method": b"GET", b":path": b"/hello", b":scheme": b"http", b":authority": b"localhost"}
    shown = [(k, v) for k, v in {**usual, **dict(headers)}.items() if v]
    flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
    return HeadersFrame(1, data=Encoder().encode(shown), flags=flags)


H2_ATTACKS = {
    "a-data-after-the-answer": h2_frames(
        h2_request((b":method", b"POST"), end=False), *(DataFrame(1, b"x" * 1000) for _ in range(20))
    ),
    "b-1100-priorities": h2_frames(*(PriorityFrame(2 * n + 1) for n in range(1100))),
    "c-path-not-ascii": h2_frames(h2_request((b":path", b"/\xff"))),
    "d-method-not-ascii": h2_frames(h2_request((b":method", b"\xff"))),
    "e-connect-without-path": h2_frames(h2_request((b":method", b"CONNECT"), (b":path", b""))),
    "g-closed-window": PREFACE
    + SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}).serialize()
    + h2_request((b":path", b"/flood")).serialize(),
    "preface-only": PREFACE,
}

UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
WEBSOCKET_ATTACKS = {
    "f-frames-too-early": request("/hello", *UPGRADE, "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==")
    + b"\x81\x85\x00\x00\x00\x00hello" * 50,
    "f-protocol-not-ascii": request("/hello", *UPGRADE, "Sec-WebSocket-Protocol: \xff"),
    "f-no-key": request("/hello", *UPGRADE),
}


@pytest.mark.usefixtures("no_errors")
class TestAttacks:
    @pytest.mark.parametrize("data", H2_ATTACKS.values(), ids=H2_ATTACKS)
    async def test_http_2_by_prior_knowledge_is_refused(self, data: bytes) -> None:
        async with serving() as running, bystander(running):
            answer = await ask(running, data)
        assert answer.startswith(b"HTTP/1.1 505")
        assert b"application/problem+json" in answer
        assert running.app.seen.count("hello") == 0

    async def test_an_upgrade_to_h2c_is_ignored(self) -> None:
        settings = "HTTP2-Settings: AAMAAABkAAQAAP__"
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", settings)
        async with serving() as running, bystander(running), await running.connect() as stream:
            for _ in range(2):  # and the connection can be used again
                await stream.send_all(request("/hello", *upgrade))
                assert (await read_until(stream, b"hello")).startswith(OK)

    async def test_the_end_of_a_client_that_offered_h2c_is_noticed(self) -> None:
        async with serving() as running:
            async with await running.connect() as stream:
                await stream.send_all(request("/wait", "Connection: Upgrade", "Upgrade: h2c"))
                await eventually(lambda: bool(running.app.peers))
            await eventually(lambda: running.app.seen == ["disconnect", "wait"])

    async def test_a_client_that_does_not_read_is_reset(self) -> None:
        async with serving(write_seconds=0.5) as running, bystander(running):
            async with await running.connect() as stream:
                await stream.send_all(request("/flood"))
                await eventually(lambda: running.app.seen == ["disconnect", "flood"])
                with pytest.raises(trio.BrokenResourceError):
                    await drop_all(stream)

    async def test_a_proxy_on_a_unix_socket_that_does_not_read_is_reset(self, tmp_path: Path) -> None:
        # TCP_USER_TIMEOUT does not exist here: the write deadline alone has to do it.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "http"))
            sock.listen()
            async with serving(sock=sock, write_seconds=0.3) as running:
                async with await trio.open_unix_socket(tmp_path / "http") as stream:
                    await stream.send_all(request("/flood"))
                    await eventually(lambda: running.app.seen == ["disconnect", "flood"])

    async def test_a_slow_reader_is_not_reset_while_it_reads(self) -> None:
        async with serving(write_seconds=0.4) as running, await running.connect() as stream:
            await stream.send_all(request("/large", "Connection: close"))
            started, received = trio.current_time(), 0
            with trio.fail_after(10):
                while part := await stream.receive_some(150_000):
                    received += len(part)
                    await trio.sleep(0.02)
            assert received > 8_000_000
            assert trio.current_time() - started > 0.8  # two deadlines long, in one call of send()

    async def test_a_cancelled_write_tears_no_hole(self) -> None:
        async with serving() as running, await running.connect() as stream:
            await stream.send_all(request("/cancelled", version="1.0"))
            await eventually(lambda: bool(running.app.peers))
            await trio.testing.wait_all_tasks_blocked(0.005)
            running.app.cancelling.cancel()
            await trio.testing.wait_all_tasks_blocked(0.005)
            body = (await read_to_end(stream)).partition(b"\r\n\r\n")[2]
        assert body == b"x" * 8_000_000 + b"end"

    async def test_100_aborted_pipelines_leave_nothing_behind(self) -> None:
        async with serving() as running, bystander(running):
            tasks, fds = living_tasks(), open_fds()
            for n in range(100):
                stream = await running.connect()
                await stream.send_all(request("/wait") + request("/hello") + b"GET /rest")
                await eventually(partial(self._has_started, running, 2 + n))
                abort(stream)
            await eventually(lambda: running.app.seen.count("wait") == 100)
            await eventually(lambda: living_tasks() == tasks and open_fds() == fds)

    def _has_started(self, running: Running, requests: int) -> bool:
        return len(running.app.peers) == requests

    async def test_a_fin_behind_a_pipelined_request_is_noticed(self) -> None:
        async with serving() as running:
            async with await running.connect() as stream:
                await stream.send_all(request("/wait") + request("/hello"))
                await eventually(lambda: bool(running.app.peers))
            await eventually(lambda: running.app.seen == ["disconnect", "wait"])

    async def test_a_cancelled_final_send_loses_no_connection(self) -> None:
        async with serving() as running, bystander(running), await running.connect() as stream:
            for _ in range(3):
                await stream.send_all(request("/suicidal"))
                await read_until(stream, b"done")
            await stream.send_all(request("/suicidal", "Connection: close"))
            assert (await read_to_end(stream)).endswith(b"done")

    async def test_starlette_can_ask_whether_the_client_is_gone(self) -> None:
        async with serving() as running:
            async with await running.connect() as stream:
                await stream.send_all(request("/ask"))
                await read_until(stream, b"there")
            await eventually(lambda: running.app.seen == ["gone", "ask"])

    async def test_sending_on_after_the_disconnect_ends(self) -> None:
        async with serving() as running, bystander(running):
            stream = await running.connect()
            await stream.send_all(request("/deaf"))
            await read_until(stream, b"\r\n\r\n")
            abort(stream)
            await eventually(lambda: running.app.seen == ["deaf"])

    async def test_a_trickled_head_has_a_deadline(self) -> None:
        async with serving(headers_seconds=0.3) as running, await running.connect() as stream:
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await self._trickle(stream)
        assert running.app.peers == []

    async def _trickle(self, stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(b"G")
            await trio.sleep(0.05)

    async def test_a_body_that_stops_has_a_deadline(self) -> None:
        async with serving(body_seconds=0.2) as running, await running.connect() as stream:
            await stream.send_all(request("/echo", "Content-Length: 9", method="POST") + b"x")
            await read_to_end(stream)
            assert running.app.seen == ["disconnect", "echo"]

    async def test_a_large_head_is_refused(self) -> None:
        async with serving(header_bytes=2000) as running:
            whole = await ask(running, request("/hello", "X-Long: " + "x" * 5000))
            endless = await ask(running, b"GET /hello HTTP/1.1\r\nX-Long: " + b"x" * 5000)
        for answer in (whole, endless):
            assert answer.startswith(b"HTTP/1.1 431")
            assert b"urn:bulkhead:problem:headers-too-large" in answer
        assert running.app.peers == []

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    async def test_bytes_behind_the_last_request_cost_nobody_an_answer(self, version: str) -> None:
        """Old clients send an empty line behind a body; a smuggler sends a request."""
        last = request("/echo", "Content-Length: 4", "Connection: close", method="POST", version=version)
        async with serving() as running, bystander(running):
            for rest in (b"\r\n", request("/boom"), b"\0" * 500_000):
                answer = await ask(running, last + b"body" + rest)
                assert answer.startswith(OK)
                assert answer.endswith(b"\r\n\r\nbody")
        assert running.app.seen.count("boom") == 0

    async def test_a_proxys_form_of_target_is_understood(self) -> None:
        async with serving() as running:
            answer = await ask(running, request("http://elsewhere.example/hello", "Connection: close"))
        assert answer.endswith(b"hello")

    @pytest.mark.parametrize(
        ("headers", "version"),
        [
            (("Content-Length: 5", "Transfer-Encoding: chunked"), "1.1"),
            (("Transfer-Encoding: chunked", "Content-Length: 5"), "1.1"),
            (("transfer-encoding: chunked", "CONTENT-LENGTH: 0"), "1.1"),
            (("Transfer-Encoding: chunked",), "1.0"),
        ],
    )
    async def test_a_request_that_could_be_smuggled_is_refused(
        self, headers: tuple[str, ...], version: str
    ) -> None:
        """What follows its end, wherever somebody else sees that, is not taken for another request."""
        async with serving() as running, bystander(running):
            data = (
                request("/echo", *headers, method="POST", version=version) + b"0\r\n\r\n" + request("/hello")
            )
            answer = await ask(running, data)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"\r\n\r\n") == 1
        assert b"urn:bulkhead:problem:ambiguous-length" in answer
        assert {"echo", "hello"}.isdisjoint(running.app.seen)

    async def test_garbage_is_refused(self) -> None:
        async with serving() as running, bystander(running):
            assert (await ask(running, b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n")).startswith(
                b"HTTP/1.1 400"
            )

    async def test_300_mutated_requests_harm_nobody(self) -> None:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        async with serving() as running, bystander(running):
            for _ in range(300):
                await self._throw(running, mutate(rng), rng)
            assert (await ask(running, request("/hello", "Connection: close"))).startswith(OK)

    async def _throw(self, running: Running, data: bytes, rng: random.Random) -> None:
        stream = await running.connect()
        try:
            for part in cuts(rng, data):
                await stream.send_all(part)
            if rng.random() < 0.3:
                abort(stream)
                return
            await stream.send_eof()
            with trio.move_on_after(0.05):
                await stream.receive_some()
        except trio.BrokenResourceError:
            pass  # the server was quicker
        finally:
            await stream.aclose()


SEEDS = (
    request(),
    request() + request("/echo", "Content-Length: 5", method="POST") + b"12345" + request(),
    request("/echo", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n0\r\n\r\n",
    *H2_ATTACKS.values(),
    *WEBSOCKET_ATTACKS.values(),
    request("/stream", "Last-Event-ID: 5", "Expect: 100-continue"),
)


def mutate(rng: random.Random) -> bytes:
    data = bytearray(rng.choice(SEEDS)[:4000])
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.randbytes(rng.randrange(20))
            case 2:
                del data[at : at + rng.randrange(30)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(100)]
            case 4:
                data[at:at] = rng.choice(
                    (b"\r\n", b"\0", b": ", b"Content-Length: 3\r\n", b"\xff" * 3, b"0\r\n")
                )
    return bytes(data)


def cuts(rng: random.Random, data: bytes) -> list[bytes]:
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(3)))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if b > a]


# -- what goes wrong on our side ----------------------------------------------------------------------------


class Trap(Mapping[str, Any]):
    """A state that raises in a connection's own task once it is armed."""

    def __init__(self) -> None:
        self.armed = False

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[str]:
        if self.armed:
            raise RuntimeError("trapped")
        return iter(())


class TestBulkheads:
    async def test_a_socket_that_does_not_listen_is_the_callers_fault(self) -> None:
        with socket.socket() as sock, pytest.RaisesGroup(OSError, flatten_subgroups=True):
            sock.bind(("127.0.0.1", 0))
            await serve(App(), [sock], limits=ServeLimits(), shutdown=trio.Event(), grace=1, state={})

    async def test_an_exception_in_a_connection_ends_only_that_one(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        trap = Trap()
        async with serving(state=trap) as running, bystander(running):
            trap.armed = True
            assert await ask(running, request()) == b""
            trap.armed = False
            assert (await ask(running, request("/hello", "Connection: close"))).startswith(OK)
        (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
        assert record.getMessage() == "a connection failed, the others go on"
        assert "trapped" in caplog.text

    async def test_an_exception_in_the_application_gives_500(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serving() as running, bystander(running):
            assert (await ask(running, request("/boom?ticket=secret"))).startswith(b"HTTP/1.1 500")
        assert "the application failed in GET /boom" in caplog.text
        assert "RuntimeError: boom" in caplog.text
        assert "secret" not in caplog.text

    async def test_an_exception_in_the_middle_cuts_the_answer_visibly(self) -> None:
        async with serving() as running, bystander(running):
            answer = await ask(running, request("/half"))
        assert b"half" in answer
        assert not answer.endswith(b"0\r\n\r\n")

    async def test_no_descriptor_left_is_survived(self, caplog: pytest.LogCaptureFixture) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with serving() as running, bystander(running):
            with trio.socket.socket() as client:
                resource.setrlimit(resource.RLIMIT_NOFILE, (first_free_descriptor(), before[1]))
                try:
                    await client.connect(("127.0.0.1", running.port))
                    await eventually(lambda: "cannot accept" in caplog.text)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, before)
                await client.send(request())
                with trio.fail_after(5):
                    assert (await client.recv(10_000)).startswith(OK)
        assert os.strerror(errno.EMFILE) in caplog.text
        assert caplog.text.count("cannot accept") == 1

    async def test_the_last_descriptors_are_not_for_connections(self) -> None:
        """A runner's ends, or the store's readers, may need them while clients come in crowds."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with serving() as running, bystander(running):
            resource.setrlimit(resource.RLIMIT_NOFILE, (first_free_descriptor() + 3, before[1]))
            try:
                refused = await ask(running, request())
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert refused.startswith(b"HTTP/1.1 503")
            async with await running.connect() as stream:
                await stream.send_all(request())
                with trio.fail_after(5):
                    assert (await stream.receive_some()).startswith(OK)


def first_free_descriptor() -> int:
    """Return the number that the next descriptor of this process gets."""
    free = os.dup(0)
    os.close(free)
    return free


@pytest.mark.usefixtures("no_errors")
class TestCap:
    async def test_above_the_cap_is_503_at_once(self) -> None:
        async with serving(connections=2) as running:
            async with await running.connect() as one, await running.connect() as two:
                for stream in (one, two):
                    await stream.send_all(request())
                    await read_until(stream, b"hello")
                answer = await ask(running, request())
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"Retry-After: 2\r\n" in answer
                assert b"urn:bulkhead:problem:too-many-connections" in answer
                await one.send_all(request())
                await read_until(one, b"hello")
            await self._served_again(running)

    async def test_more_than_the_pace_waits_and_nobody_is_refused(self) -> None:
        async with serving(accepts_per_second=20) as running, bystander(running):
            started, streams = trio.current_time(), [await running.connect() for _ in range(40)]
            for stream in streams:
                await stream.send_all(request("/hello", "Connection: close"))
                assert (await read_to_end(stream)).startswith(OK)
            assert (
                trio.current_time() - started > 0.9
            )  # 20 at once, one of them the bystander; 21 at 20 a second
            for stream in streams:
                await stream.aclose()

    async def test_above_the_cap_event_streams_are_told_when_to_come_back(self) -> None:
        async with serving(connections=1) as running, bystander(running):
            answer = await ask(running, request("/stream", "Accept: text/event-stream"))
        assert answer.startswith(OK)
        assert b"\r\n\r\nretry: " in answer
        assert answer.endswith(b"\n\nevent: stream.busy\ndata: {}\n\n")

    async def test_a_silent_client_above_the_cap_goes_as_well(self) -> None:
        async with serving(connections=1) as running, bystander(running):
            tasks, fds = living_tasks(), open_fds()
            for _ in range(100):
                await (await running.connect()).aclose()
            stream = await running.connect()
            assert await read_to_end(stream) == b""
            await stream.aclose()
            await eventually(lambda: living_tasks() == tasks and open_fds() == fds)

    async def _served_again(self, running: Running) -> None:
        with trio.fail_after(5):
            while not (await ask(running, request("/hello", "Connection: close"))).startswith(OK):
                pass


@pytest.mark.usefixtures("no_errors")
class TestShutdown:
    async def test_idle_connections_end_at_once(self) -> None:
        async with (
            serving(grace=20) as running,
            await running.connect() as used,
            await running.connect() as new,
        ):
            await used.send_all(request())
            await read_until(used, b"hello")
            await new.send_all(b"GET /hel")
            running.shutdown.set()
            assert await read_to_end(used) == b""
            await read_to_end(new)
            with trio.fail_after(2):
                await running.ended.wait()

    async def test_an_answer_under_way_is_finished(self) -> None:
        async with serving(grace=20) as running, await running.connect() as stream:
            await stream.send_all(request("/echo", "Content-Length: 4", method="POST") + b"bo")
            await eventually(lambda: bool(running.app.peers))
            running.shutdown.set()
            await stream.send_all(b"dy")
            assert (await read_to_end(stream)).endswith(b"\r\n\r\nbody")
            with trio.fail_after(2):
                await running.ended.wait()

    async def test_a_stuck_client_does_not_hold_it(self) -> None:
        async with serving(grace=0.2) as running, await running.connect() as stream:
            await stream.send_all(request("/flood"))
            await read_until(stream, b"xxx")
            running.shutdown.set()
            with trio.fail_after(2):
                await running.ended.wait()

    async def test_cancelling_does_not_wait_for_a_stuck_client(self) -> None:
        with trio.fail_after(5):
            with listening() as listener:
                async with trio.open_nursery() as nursery:
                    run = partial(serve, limits=ServeLimits(), shutdown=trio.Event(), grace=9, state={})
                    await nursery.start(run, App(), [listener])
                    async with await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1]) as stream:
                        await stream.send_all(request("/flood"))
                        await read_until(stream, b"xxx")
                        nursery.cancel_scope.cancel()

    async def test_cancelling_cuts_answers_off_instead_of_failing_them(self) -> None:
        """A 500 would be the last that an EventSource asks for; after a reset it comes back."""
        app = App()
        with trio.fail_after(5), listening() as listener:
            async with await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1]) as stream:
                async with trio.open_nursery() as nursery:
                    run = partial(serve, limits=ServeLimits(), shutdown=trio.Event(), grace=9, state={})
                    await nursery.start(run, app, [listener])
                    await stream.send_all(request("/wait"))
                    await eventually(lambda: bool(app.peers))
                    nursery.cancel_scope.cancel()
                assert await read_to_end(stream) == b""

    async def test_what_is_left_after_the_grace_is_reset(self) -> None:
        async with serving(grace=0.1) as running, await running.connect() as stream:
            await stream.send_all(request("/wait"))
            await eventually(lambda: bool(running.app.peers))
            running.shutdown.set()
            with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()

    async def test_the_listening_socket_goes_on_to_the_next_server(self) -> None:
        with listening() as listener:
            async with serving(sock=listener):
                pass
            with socket.create_connection(listener.getsockname()) as between:  # waits in the backlog
                between.sendall(request("/hello", "Connection: close"))
                async with serving(sock=listener):
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(between))
                    assert (await read_to_end(stream)).endswith(b"hello")

    async def test_it_leaves_no_descriptor(self) -> None:
        with listening() as listener:
            fds = open_fds()
            async with serving(sock=listener) as running:
                await ask(running, request("/hello", "Connection: close"))
            assert open_fds() == fds
