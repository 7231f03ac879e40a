"""WebSockets against raw clients on real sockets: what one of them does, the others must not notice."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import upgrade as room
from tests.unit.gateway.test_serve import (
    OK,
    App,
    Running,
    abort,
    bystander,
    eventually,
    living_tasks,
    open_fds,
    read_to_end,
    read_until,
    request,
    serving,
)
from tests.websockets import ACCEPT, BINARY, CLOSE, CONTINUATION, PING, PONG, Reader, frame, upgrade


@dataclass
class SocketApp(App):
    """Besides its pages, a WebSocket path for each way to behave."""

    codes: list[int] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    opening: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await super().__call__(scope, receive, send)
            return
        self.scopes.append(scope)
        name = scope["path"].strip("/").replace("-", "_")
        try:
            await getattr(self, f"ws_{name}")(WebSocket(scope, receive, send))
        except WebSocketDisconnect as error:
            self.codes.append(error.code)
        finally:
            self.seen.append(name)

    async def ws_echo(self, socket: WebSocket) -> None:
        await socket.accept()
        while True:
            text = await socket.receive_text()
            self.heard.append(text)
            await socket.send_text(text)

    async def ws_bytes(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(str(len(await socket.receive_bytes())))
        await socket.receive_text()

    async def ws_late(self, socket: WebSocket) -> None:
        await self.opening.wait()
        await self.ws_echo(socket)

    async def ws_deaf(self, socket: WebSocket) -> None:
        """Take no message until it may."""
        await socket.accept()
        await self.opening.wait()
        await self.ws_drain(socket)

    async def ws_drain(self, socket: WebSocket) -> None:
        while True:
            self.heard.append(await socket.receive_text())

    async def ws_flood(self, socket: WebSocket) -> None:
        await socket.accept()
        while True:
            await socket.send_text("x" * 100_000)

    async def ws_bye(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.close(4321, "enough")

    async def ws_return(self, socket: WebSocket) -> None:
        await socket.accept()

    async def ws_boom(self, socket: WebSocket) -> None:
        await socket.accept()
        raise RuntimeError("boom")

    async def ws_boom_first(self, socket: WebSocket) -> None:
        raise RuntimeError("boom")

    async def ws_silent(self, socket: WebSocket) -> None:
        await socket.receive()

    async def ws_refuse(self, socket: WebSocket) -> None:
        await socket.receive()
        await socket.close(1008)

    async def ws_deny(self, socket: WebSocket) -> None:
        await socket.send_denial_response(Response("no", 401, {"WWW-Authenticate": "Bearer"}))

    async def ws_protocol(self, socket: WebSocket) -> None:
        await socket.accept("b", [(b"x-more", b"1")])
        await socket.receive_text()


@dataclass
class Client:
    """A connection whose handshake has been answered with 101."""

    stream: trio.SocketStream
    reader: Reader
    head: bytes

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read(self) -> bool:
        """Take some bytes; return whether there were any."""
        with trio.fail_after(5):
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return False
        self.reader.receive(data)
        return bool(data)

    async def text(self, number: int = 1) -> str:
        """Return the `number`-th message."""
        while len(self.reader.texts) < number:
            assert await self.read(), f"end of file; close code {self.reader.code}"
        return self.reader.texts[number - 1]

    async def close_code(self) -> int | None:
        """Read to the end; return the code of the server's close."""
        while self.reader.code is None and await self.read():
            pass
        return self.reader.code

    async def ends(self) -> None:
        """Expect end of file."""
        assert await read_to_end(self.stream) == b""


@asynccontextmanager
async def connected(running: Running, path: str = "/echo", *headers: str) -> AsyncIterator[Client]:
    async with await running.connect() as stream:
        await stream.send_all(upgrade(path, *headers))
        head, _, rest = (await read_until(stream, b"\r\n\r\n")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head
        client = Client(stream, Reader(), head)
        client.reader.receive(rest)
        yield client


@asynccontextmanager
async def beside(running: Running) -> AsyncIterator[None]:
    """Have a stream and a WebSocket open meanwhile, which must not notice anything."""
    async with bystander(running), connected(running) as other:
        await other.send(frame(b"before"))
        assert await other.text() == "before"
        yield
        await other.send(frame(b"after"))
        assert await other.text(2) == "after"


def app_of(running: Running) -> SocketApp:
    assert isinstance(running.app, SocketApp)
    return running.app


async def refusal(running: Running, data: bytes) -> bytes:
    async with await running.connect() as stream:
        await stream.send_all(data)
        return await read_to_end(stream)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Expect no error in the log."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.usefixtures("quiet")
class TestHandshake:
    async def test_the_example_of_the_rfc(self) -> None:
        async with serving(SocketApp()) as running, connected(running) as client:
            assert f"Sec-WebSocket-Accept: {ACCEPT}".encode() in client.head
            assert b"Upgrade: websocket" in client.head
            assert b"Extensions" not in client.head
            await client.send(frame("käse".encode()))
            assert await client.text() == "käse"

    async def test_the_application_gets_a_websocket_scope(self) -> None:
        async with serving(SocketApp(), state={"engine": 1}) as running:
            async with connected(running, "/echo?token=%20x", "Sec-WebSocket-Protocol: a, b"):
                (scope,) = app_of(running).scopes
        assert (scope["path"], scope["query_string"]) == ("/echo", b"token=%20x")
        assert scope["subprotocols"] == ["a", "b"]
        assert scope["state"]["engine"] == 1
        assert scope["state"]["peer"].client == scope["client"]
        assert (b"host", b"localhost") in scope["headers"]

    async def test_a_subprotocol_and_headers_of_the_application_arrive(self) -> None:
        async with serving(SocketApp()) as running:
            async with connected(running, "/protocol", "Sec-WebSocket-Protocol: a, b") as client:
                assert b"Sec-WebSocket-Protocol: b\r\nx-more: 1" in client.head

    async def test_frames_in_the_packet_of_the_handshake_are_heard(self) -> None:
        async with serving(SocketApp()) as running, beside(running), await running.connect() as stream:
            await stream.send_all(upgrade("/echo") + frame(b"early") + frame(b"bird"))
            data = await read_until(stream, b"bird")
        assert data.startswith(b"HTTP/1.1 101")
        assert data.index(b"\r\n\r\n") < data.index(b"early") < data.index(b"bird")

    async def test_frames_before_the_answer_wait_for_it(self) -> None:
        async with serving(SocketApp()) as running, await running.connect() as stream:
            await stream.send_all(upgrade("/late"))
            await eventually(lambda: bool(app_of(running).scopes))
            await stream.send_all(frame(b"early"))
            await trio.testing.wait_all_tasks_blocked(0.005)
            app_of(running).opening.set()
            assert b"early" in await read_until(stream, b"early")

    async def test_more_than_fits_before_the_answer_waits_in_the_socket(self) -> None:
        text = b"x" * 10_000
        async with serving(SocketApp()) as running, beside(running), await running.connect() as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, upgrade("/late") + frame(text) * 100)
                await eventually(lambda: len(app_of(running).scopes) == 2)
                await trio.testing.wait_all_tasks_blocked(0.005)
                app_of(running).opening.set()
                received = b""
                with trio.fail_after(5):
                    while len(received) < 1_000_000:
                        received += await stream.receive_some()

    async def test_a_handshake_in_single_bytes(self) -> None:
        async with serving(SocketApp()) as running, await running.connect() as stream:
            for byte in upgrade("/echo") + frame(b"hello"):
                await stream.send_all(bytes([byte]))
            await read_until(stream, b"hello")

    async def test_it_may_follow_a_request_on_the_same_connection(self) -> None:
        async with serving(SocketApp()) as running, await running.connect() as stream:
            await stream.send_all(request() + upgrade("/echo") + frame(b"third"))
            data = await read_until(stream, b"third")
        assert data.startswith(OK)
        assert data.index(b"hello") < data.index(b"HTTP/1.1 101")

    @pytest.mark.parametrize(
        "data",
        [
            upgrade("/hello").replace(b"GET", b"POST"),
            upgrade("/hello").replace(b"HTTP/1.1", b"HTTP/1.0"),
            upgrade("/hello").replace(b"keep-alive, Upgrade", b"keep-alive"),
            upgrade("/hello").replace(b"Upgrade: websocket", b"Upgrade: IRC/6.9"),
            upgrade("/hello", "Content-Length: 0"),
        ],
        ids=["post", "http-1.0", "no-connection-upgrade", "another-protocol", "with-a-body"],
    )
    async def test_what_asks_for_no_websocket_is_a_plain_request(self, data: bytes) -> None:
        async with serving(SocketApp()) as running, beside(running), await running.connect() as stream:
            await stream.send_all(data)
            assert (await read_until(stream, b"hello")).startswith(OK)

    @pytest.mark.parametrize("version", ["8", "13, 8", "\xff", None])
    async def test_another_version_is_told_ours(self, version: str | None) -> None:
        async with serving(SocketApp()) as running, beside(running):
            answer = await refusal(running, upgrade("/echo", version=version))
        assert answer.startswith(b"HTTP/1.1 426")
        assert b"sec-websocket-version: 13" in answer
        assert b"urn:bulkhead:problem:upgrade-required" in answer

    @pytest.mark.parametrize("key", ["", "short", "dGhlIHNhbXBsZSBub25jZQ", "\xff" * 24, None])
    async def test_a_key_that_is_none_is_400(self, key: str | None) -> None:
        async with serving(SocketApp()) as running, beside(running):
            answer = await refusal(running, upgrade("/echo", key=key))
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"application/problem+json" in answer

    async def test_two_keys_are_400(self) -> None:
        async with serving(SocketApp()) as running:
            assert (
                await refusal(running, upgrade("/echo", "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA=="))
            ).startswith(b"HTTP/1.1 400")

    @pytest.mark.parametrize(
        ("path", "status", "text"),
        [
            ("/refuse", b"403", b"urn:bulkhead:problem:forbidden"),
            ("/deny", b"401", b"WWW-Authenticate: Bearer"),
            ("/silent", b"500", b"urn:bulkhead:problem:internal"),
        ],
    )
    async def test_a_refusal_is_an_http_response(self, path: str, status: bytes, text: bytes) -> None:
        async with serving(SocketApp()) as running, beside(running):
            answer = await refusal(running, upgrade(path) + frame(b"early") * 100)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert text.lower() in answer.lower()
        assert b"connection: close" in answer

    async def test_a_client_that_leaves_before_the_answer(self) -> None:
        async with serving(SocketApp()) as running, beside(running):
            tasks, fds = living_tasks(), open_fds()
            for _ in range(20):
                async with await running.connect() as stream:
                    await stream.send_all(upgrade("/late") + frame(b"early"))
            stream = await running.connect()
            await stream.send_all(upgrade("/late"))
            await eventually(lambda: len(app_of(running).scopes) == 22)
            abort(stream)
            await trio.testing.wait_all_tasks_blocked(0.005)
            app_of(running).opening.set()
            await eventually(lambda: app_of(running).seen.count("late") == 21)
            await eventually(lambda: living_tasks() == tasks and open_fds() == fds)


@pytest.mark.usefixtures("quiet")
class TestMessages:
    async def test_fragments_are_one_message(self) -> None:
        parts = frame(b"a", fin=False) + frame(b"", CONTINUATION, fin=False) + frame(b"?", PING)
        async with serving(SocketApp()) as running, connected(running) as client:
            await client.send(parts + frame(b"b", CONTINUATION))
            assert await client.text() == "ab"
            assert client.reader.pongs == [b"?"]

    async def test_a_character_may_be_cut(self) -> None:
        async with serving(SocketApp()) as running, connected(running) as client:
            await client.send(frame(b"\xc3", fin=False) + frame(b"\xa4", CONTINUATION))
            assert await client.text() == "ä"

    async def test_bytes_arrive(self) -> None:
        async with serving(SocketApp()) as running, connected(running, "/bytes") as client:
            await client.send(frame(b"\xff" * 300, BINARY))
            assert await client.text() == "300"

    async def test_of_many_pings_some_are_answered_and_the_last(self) -> None:
        async with serving(SocketApp()) as running, connected(running) as client:
            await client.send(b"".join(frame(b"%d" % n, PING) for n in range(5_000)))
            while client.reader.pongs[-1:] != [b"4999"]:
                assert await client.read()
            assert len(client.reader.pongs) < 2_500

    async def test_an_application_that_does_not_take_messages_stops_the_client(self) -> None:
        data, sent = frame(b"x" * 60_000) * 20, 0
        async with serving(SocketApp()) as running, beside(running), connected(running, "/deaf") as client:
            with trio.move_on_after(0.3):
                while True:
                    await client.send(data)
                    sent += len(data)
            assert sent < 40_000_000  # what kernels buffer on loopback, and half a megabyte of ours
            app_of(running).opening.set()
            await eventually(lambda: bool(app_of(running).heard[2:]))

    async def test_large_messages_of_ours_arrive(self) -> None:
        async with serving(SocketApp(), message_bytes=2_000_000) as running, connected(running) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, frame(b"x" * 1_500_000))
                assert len(await client.text()) == 1_500_000


@pytest.mark.usefixtures("quiet")
class TestClosing:
    async def test_the_client_closes(self) -> None:
        async with serving(SocketApp()) as running, connected(running) as client:
            await client.send(frame(struct.pack("!H", 4000) + b"bye", CLOSE))
            assert await client.close_code() == 4000
            await client.ends()
            await eventually(lambda: app_of(running).codes == [4000])

    async def test_the_client_closes_without_a_code(self) -> None:
        async with serving(SocketApp()) as running, connected(running) as client:
            await client.send(frame(b"", CLOSE) + frame(b"behind it"))
            assert await client.close_code() == 1005
            await client.ends()
            await eventually(lambda: app_of(running).codes == [1005])
        assert app_of(running).heard == []

    @pytest.mark.parametrize(("path", "code"), [("/bye", 4321), ("/return", 1000)])
    async def test_the_application_closes(self, path: str, code: int) -> None:
        async with serving(SocketApp()) as running, connected(running, path) as client:
            assert await client.close_code() == code
            await client.send(frame(struct.pack("!H", code), CLOSE))
            await client.ends()

    async def test_a_client_that_does_not_answer_a_close_is_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "CLOSE_SECONDS", 0.1)
        async with serving(SocketApp()) as running, beside(running), connected(running, "/bye") as client:
            assert await client.close_code() == 4321
            await client.ends()

    @pytest.mark.parametrize("how", ["fin", "rst"])
    async def test_a_client_that_leaves_without_a_word(self, how: str) -> None:
        async with serving(SocketApp()) as running, beside(running):
            async with connected(running) as client:
                if how == "rst":
                    abort(client.stream)
            await eventually(lambda: app_of(running).codes == [1006])

    async def test_a_shutdown_does_not_wait_for_a_stuck_client(self) -> None:
        async with serving(SocketApp(), grace=0.2) as running, connected(running, "/flood") as client:
            await client.read()
            running.shutdown.set()
            with trio.fail_after(2):
                await running.ended.wait()


INVALID = {
    "unmasked": (frame(b"hello", masked=False), 1002),
    "reserved-bit": (frame(b"hello", reserved=4), 1002),
    "reserved-opcode": (frame(b"hello", 3), 1002),
    "fragmented-ping": (frame(b"", PING, fin=False), 1002),
    "large-ping": (frame(b"x" * 126, PING), 1002),
    "continuation-of-nothing": (frame(b"hello", CONTINUATION), 1002),
    "text-within-text": (frame(b"a", fin=False) + frame(b"b"), 1002),
    "close-of-one-byte": (frame(b"\x03", CLOSE), 1002),
    "close-with-a-bad-code": (frame(struct.pack("!H", 1005), CLOSE), 1002),
    "close-reason-no-utf-8": (frame(struct.pack("!H", 1000) + b"\xff", CLOSE), 1007),
    "length-with-its-top-bit": (frame(b"", announced=1 << 63), 1002),
    "no-utf-8": (frame(b"\xff"), 1007),
    "utf-8-cut-off": (frame(b"\xc3"), 1007),
    "a-surrogate": (frame(b"\xed\xa0\x80"), 1007),
    "too-large": (frame(b"x" * 70_000), 1009),
    "too-large-in-fragments": (frame(b"x" * 40_000, fin=False) + frame(b"x" * 40_000, CONTINUATION), 1009),
    "announced-too-large": (frame(b"x" * 70_000, announced=1 << 40), 1009),
}


class TestAttacks:
    @pytest.mark.parametrize(("data", "code"), INVALID.values(), ids=INVALID)
    @pytest.mark.usefixtures("quiet")
    async def test_a_broken_rule_ends_its_own_connection(self, data: bytes, code: int) -> None:
        async with serving(SocketApp()) as running, beside(running), connected(running) as client:
            await client.send(frame(b"fine"))
            await client.text()
            await client.send(data + frame(b"behind it"))
            assert await client.close_code() == code
            await client.ends()
            await eventually(lambda: app_of(running).codes == [code])
            assert client.reader.texts == ["fine"]
            assert app_of(running).heard == ["before", "fine"]

    @pytest.mark.usefixtures("quiet")
    async def test_the_code_outruns_what_the_client_goes_on_sending(self) -> None:
        much = frame(
            b"x" * 4_000_000, announced=1 << 40
        )  # masking it takes a second, which nobody else shall wait
        async with serving(SocketApp()) as running, beside(running), connected(running) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_all, client, much)
                assert await client.close_code() == 1009
                nursery.cancel_scope.cancel()

    async def _send_all(self, client: Client, data: bytes) -> None:
        try:
            await client.send(data)
        except trio.BrokenResourceError:
            pass

    @pytest.mark.usefixtures("quiet")
    async def test_a_client_that_does_not_read_is_reset(self) -> None:
        async with serving(SocketApp(), write_seconds=0.3) as running, beside(running):
            async with connected(running, "/flood"):
                await eventually(lambda: app_of(running).codes == [1006])

    @pytest.mark.usefixtures("quiet")
    async def test_pings_from_a_client_that_does_not_read_are_its_own_trouble(self) -> None:
        async with serving(SocketApp(), write_seconds=0.3) as running, beside(running):
            async with connected(running) as client:
                with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                    await self._ping_for_ever(client)

    async def _ping_for_ever(self, client: Client) -> None:
        while True:
            await client.send(frame(b"x" * 100, PING) * 1_000)

    @pytest.mark.usefixtures("quiet")
    async def test_a_dead_peer_is_let_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "PING_SECONDS", 0.3)
        monkeypatch.setattr(room, "PONG_SECONDS", 0.15)
        async with serving(SocketApp()) as running, bystander(running), connected(running) as dead:
            async with connected(running) as alive:
                for _ in range(3):
                    assert await alive.read()
                    await alive.send(frame(alive.reader.pings[-1], PONG))
                await eventually(lambda: app_of(running).codes == [1006])
                assert await alive.read()
            assert await dead.close_code() is None

    @pytest.mark.usefixtures("quiet")
    async def test_a_deaf_application_makes_no_dead_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "PING_SECONDS", 0.1)
        monkeypatch.setattr(room, "PONG_SECONDS", 0.05)
        async with serving(SocketApp()) as running, connected(running, "/deaf") as client:
            await client.send(frame(b"x") * 50)
            while len(client.reader.pings) < 4:  # unanswered, as we would have to read what answers
                assert await client.read()
            app_of(running).opening.set()
            await eventually(lambda: len(app_of(running).heard) == 50)

    async def test_an_exception_of_the_application_is_1011(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serving(SocketApp()) as running, beside(running):
            async with connected(running, "/boom?token=secret") as client:
                assert await client.close_code() == 1011
        assert "the application failed in the WebSocket /boom" in caplog.text
        assert "secret" not in caplog.text

    async def test_an_exception_before_the_answer_is_500(self, caplog: pytest.LogCaptureFixture) -> None:
        async with serving(SocketApp()) as running, beside(running):
            answer = await refusal(running, upgrade("/boom-first"))
        assert answer.startswith(b"HTTP/1.1 500")
        assert b"application/problem+json" in answer
        assert "RuntimeError: boom" in caplog.text

    @pytest.mark.usefixtures("quiet")
    async def test_200_mutated_conversations_harm_nobody(self) -> None:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        async with serving(SocketApp()) as running, beside(running):
            tasks, fds = living_tasks(), open_fds()
            for _ in range(200):
                await self._throw(running, rng)
            await eventually(lambda: living_tasks() == tasks and open_fds() == fds)

    async def _throw(self, running: Running, rng: random.Random) -> None:
        data = bytearray(b"".join(rng.choice(SEEDS) for _ in range(4)))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        stream = await running.connect()
        try:
            await stream.send_all((upgrade("/echo") if rng.random() < 0.8 else b"") + bytes(data))
            if rng.random() < 0.3:
                abort(stream)
                return
            await stream.send_eof()
            with trio.move_on_after(0.02):
                await stream.receive_some()
        except trio.BrokenResourceError:
            pass  # the server was quicker
        finally:
            await stream.aclose()


SEEDS = (
    frame(b"hello"),
    frame(b"a", fin=False) + frame(b"b", CONTINUATION),
    frame(b"?", PING),
    frame(struct.pack("!H", 1000), CLOSE),
    frame(b"x" * 300, BINARY),
    *(data[:2_000] for data, _ in INVALID.values()),
    upgrade("/echo"),
    request("/hello", "Upgrade: websocket", "Connection: Upgrade"),
)


async def test_a_pipeline_behind_an_accepted_handshake_is_no_request() -> None:
    """What follows is frames: an HTTP request there must not be served (request smuggling)."""
    app = SocketApp()
    async with serving(app) as running, beside(running), connected(running) as client:
        await client.send(request("/hello"))
        assert await client.close_code() == 1002
    assert app.seen.count("hello") == 0


async def test_cancelling_resets_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with serving(SocketApp(), grace=0.1) as running, connected(running) as client:
        running.shutdown.set()
        assert await client.close_code() is None
    assert caplog.records == []


def test_a_ping_is_due_before_proxies_give_up() -> None:
    assert room.PONG_SECONDS < room.PING_SECONDS < 55
