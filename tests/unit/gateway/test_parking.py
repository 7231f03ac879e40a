"""Streams that wait without a task, over real sockets: what happens to them is what happens to any stream."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from gateway import plain
from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.bounds import ServeLimits
from gateway.broadcast import Seat
from gateway.direct import Direct
from gateway.grants import Revocation
from gateway.retention import Retention
from gateway.serve import serve
from gateway.store.rows import RunRow
from gateway.tally import DoorTally
from taskkit.claims import Claims
from taskkit.lifecycle import RunStatus
from tests.streams import SseDecoder
from tests.unit.gateway.fakes import KEY, StubEngine, token

#: How a request is made that is parsed by h11, that is plain, and what the second plain one of a token and a run is.
KINDS = ("parsed", "old", "plain", "direct")


@dataclass
class Place:
    """A gateway's streams on a port, without the rest of it."""

    engine: StubEngine
    direct: Direct
    door: DoorTally
    port: int
    shutdown: trio.Event
    run: RunRow
    bearer: str = field(default_factory=token)

    def request(
        self, kind: str, run: RunRow | None = None, *, query: str = "", bearer: str | None = None, **more: str
    ) -> bytes:
        version = "1.0" if kind == "old" else "1.1"
        headers = {
            "Host": "localhost",
            "Accept": "text/event-stream",
            "Authorization": f"Bearer {bearer or self.bearer}",
        }
        if kind == "parsed":
            headers["Connection"] = "keep-alive, x"  # enough to be unusual
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        lines = [f"GET /api/v1/runs/{(run or self.run).id}/events{query} HTTP/{version}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    async def open(self, kind: str, **more: Any) -> Stream:
        """Open a stream; return when its head and first bytes have come."""
        if kind == "direct":
            async with await self.open("plain", **more):  # the token is known from here on, and
                stream = await self._open("plain", **more)  # the run as long as somebody follows it
        else:
            stream = await self._open(kind, **more)
        return stream

    async def _open(self, kind: str, **more: Any) -> Stream:
        stream = Stream(await trio.open_tcp_stream("127.0.0.1", self.port))
        await stream.send(self.request(kind, **more))
        await stream.until(b"retry: ")
        return stream

    async def until(self, **wanted: int) -> None:
        """Wait until the hub counts so many."""
        with trio.fail_after(5):
            while any(self.engine.hub.statistics()[name] != count for name, count in wanted.items()):
                await trio.sleep(0.005)


class Stream:
    """A client's end."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.received = b""

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    def reset(self) -> None:
        self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._stream.socket.close()

    async def until(self, mark: bytes) -> None:
        with trio.fail_after(5):
            while mark not in self.received:
                part = await self._stream.receive_some()
                assert part, f"end of file after {self.received!r}"
                self.received += part

    async def to_end(self) -> None:
        with trio.fail_after(8):
            async for part in self._stream:
                self.received += part

    @property
    def body(self) -> bytes:
        """What the first answer's body says, without its chunks."""
        head, _, data = self.received.partition(b"\r\n\r\n")
        if b"chunked" not in head.lower():
            return data
        content = b""
        while data and not data.startswith(b"0\r\n"):
            size, _, data = data.partition(b"\r\n")
            content += data[: int(size, 16)]
            data = data[int(size, 16) + 2 :]
        return content

    @property
    def ids(self) -> list[int]:
        return [int(event.id) for event in SseDecoder().receive(self.body)]


@asynccontextmanager
async def place(grace: float = 0.5, **limits: Any) -> AsyncIterator[Place]:
    """Serve the streams of an engine with one run."""
    engine = StubEngine()
    if limits:
        engine.settings = engine.settings.__class__(**{"limits": limits})
    settings = engine.settings
    auth = Authenticator(KEY, ["testserver"], settings.cors_origins, desk=engine, limits=settings.limits)
    door, shutdown = DoorTally(), trio.Event()
    direct = Direct(engine, auth)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        app = build_app(engine, auth, Retention(engine.store, settings, "boot"))

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve(
                app,
                [listener],
                limits=ServeLimits(accepts_per_second=100_000),
                shutdown=shutdown,
                grace=grace,
                state={},
                door=door,
                direct=direct.stream_of,
                task_status=task_status,
            )

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.hub.broadcast.run)
                async with trio.open_nursery() as serving:
                    await serving.start(run)
                    yield Place(engine, direct, door, listener.getsockname()[1], shutdown, engine.start())
                    shutdown.set()
                nursery.cancel_scope.cancel()
    assert door.open == 0
    assert engine.hub.statistics()["subscribers"] == engine.hub.statistics()["riders"] == 0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_who_waits_has_no_task(kind: str) -> None:
    async with place() as here:
        before, clients = tasks(), [await here.open(kind) for _ in range(20)]
        await here.until(riders=20)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert tasks() == before
        for client in clients:
            await client.__aexit__()
        await here.until(riders=0, subscribers=0)


async def test_history_then_live_then_the_end(kind: str) -> None:
    async with place() as here:
        here.engine.emit(here.run, ("a", 1), ("a", 2))
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.engine.emit(here.run, ("a", 3))
            await client.until(b"id: 3\n")
            here.engine.end(here.run)
            await client.until(b"stream.end")
            if kind == "old":
                await client.to_end()
            else:
                await client.until(b"\r\n0\r\n\r\n")
            assert client.ids == [1, 2, 3, 4]
            await here.until(riders=0, subscribers=0)


async def test_the_connection_serves_the_next_request_behind_a_stream() -> None:
    async with place() as here:
        async with await here.open("direct") as client:
            await here.until(riders=1)
            await client.send(here.request("plain", query="?after=1"))  # pipelined, while it rides
            here.engine.end(here.run)
            await client.until(b"HTTP/1.1 204 ")
            await client.send(here.request("parsed", query="?after=1"))
            await client.until(b"HTTP/1.1 204 ")


async def test_a_client_that_leaves_frees_its_place(kind: str) -> None:
    async with place() as here:
        before = len(os.listdir("/proc/self/fd"))
        for leaving in ("close", "reset"):
            client = await here.open(kind)
            await here.until(riders=1)
            if leaving == "reset":
                client.reset()
            else:
                await client.__aexit__()
            await here.until(riders=0, subscribers=0)
        with trio.fail_after(5):
            while here.door.open or len(os.listdir("/proc/self/fd")) > before:
                await trio.sleep(0.005)


async def test_a_stream_ends_with_its_token(kind: str) -> None:
    async with place() as here:
        here.bearer = token(ttl=2.0)
        async with await here.open(kind) as client:
            await here.until(riders=1)
            with trio.fail_after(5):
                while not client.received.endswith(b"0\r\n\r\n"):
                    part = await client._stream.receive_some()
                    client.received += part
                    if not part:
                        break
            await here.until(riders=0, subscribers=0)


async def test_a_stream_ends_when_its_token_is_taken_back(kind: str) -> None:
    async with place() as here:
        here.bearer = token(subject="somebody")
        async with await here.open(kind) as client, await here.open(kind, bearer=token()) as other:
            await here.until(riders=2)
            await here.engine.revoke(Revocation("sub", "somebody", 4_000_000_000.0))
            here.direct._authenticator.sessions.end_revoked()
            await here.until(riders=1)
            here.engine.emit(here.run, ("a", 1))
            await other.until(b"id: 1\n")
            assert b"id: 1\n" not in client.received
        assert here.direct.stream_of(read(here.request("plain"))) is None


async def test_a_token_that_is_taken_back_on_the_way_to_the_seat_counts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place() as here:
        broadcast = here.engine.hub.broadcast
        board = broadcast.board

        def late(seat: Seat, fd: int) -> None:
            for sessions in here.direct._authenticator.sessions._open.values():
                for session in sessions:
                    session.end()
            board(seat, fd)

        client = await here.open(kind)
        await here.until(riders=1)
        monkeypatch.setattr(broadcast, "board", late)
        async with client, await here.open(kind):
            await here.until(riders=0, subscribers=0)


async def test_a_shutdown_ends_streams_with_the_time_to_come_back(kind: str) -> None:
    async with place() as here:
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.engine.hub.end_streams()
            here.shutdown.set()
            await client.to_end()
            assert len(re.findall(rb"retry: \d+", client.body)) == 2


async def test_a_shutdown_resets_what_is_left(kind: str) -> None:
    async with place(grace=0.05) as here:
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.shutdown.set()
            with pytest.raises(trio.BrokenResourceError):
                await client.to_end()


async def test_everything_comes_once_whatever_the_client_takes(kind: str, rng: random.Random) -> None:
    total = 400
    async with place() as here:

        async def read_slowly(client: Stream) -> None:
            with trio.fail_after(20):
                while b"stream.end" not in client.received:
                    client.received += await client._stream.receive_some(rng.randint(1, 200_000))
                    await trio.sleep(rng.random() * 0.01)

        clients = [await here.open(kind) for _ in range(3)]
        async with trio.open_nursery() as readers:
            for client in clients:
                readers.start_soon(read_slowly, client)
            for number in range(total):
                here.engine.emit(here.run, ("a", "x" * rng.randint(0, 20_000)))
                if number % 7 == 0:
                    await trio.sleep(rng.random() * 0.005)
            here.engine.end(here.run)
        for client in clients:
            assert client.ids == list(range(1, total + 2))
            await client.__aexit__()


# --- what is plain, and what is direct --------------------------------------------------------------------------------


def read(data: bytes, most: int = 16_384) -> plain.Request:
    request = plain.read(bytearray(data), most)
    assert request is not None
    return request


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /events HTTP/1.1\r\nHost: a\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET /events HTTP/1.1\r\nAccept: a\r\n\r\n",
        b"GET /events HTTP/1.0\r\nHost: a\r\n\r\n",
        b"HEAD /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"get /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /events HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        b"GET /%65vents HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a/events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET  /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /events HTTP/1.1\nHost: a\n\n",
        b"GET /events HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nX: \xff\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
        b"GET /events HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_plain_is_for_the_parser(data: bytes) -> None:
    assert plain.read(bytearray(data), 16_384) is None


def test_a_plain_request_is_read_as_the_parser_reads_it() -> None:
    head = b"GET /a/events?x=%41&y HTTP/1.1\r\nHOST:  a\r\nX-Y:\tone two\r\nConnection: Keep-Alive\r\n\r\n"
    request = read(head + b"GET /more")
    assert request.size == len(head)
    assert (request.path, request.query) == (b"/a/events", b"x=%41&y")
    assert request.headers == [(b"host", b"a"), (b"x-y", b"one two"), (b"connection", b"Keep-Alive")]


async def test_what_would_be_refused_is_never_direct() -> None:
    async with place() as here:
        other = here.engine.start(task="other.task")
        ended = here.engine.start()
        here.engine.end(ended)
        async with await here.open("plain"), await here.open("plain", run=other):
            narrow = token(runs=(here.run.id,), tasks=())
            mute = token(actions=("submit",))
            for bearer in (narrow, mute):
                await ask(here, here.request("plain", bearer=bearer))  # known from here on, if it is good
            cases = {
                "usual": (here.request("plain"), True),
                "a cursor": (here.request("plain", query="?after=now"), True),
                "of its own run": (here.request("plain", bearer=narrow), True),
                "of another run": (here.request("plain", run=other, bearer=narrow), False),
                "may not read": (here.request("plain", bearer=mute), False),
                "an unknown token": (here.request("plain", bearer=token()), False),
                "garbage for a token": (here.request("plain", bearer="x"), False),
                "a strange host": (here.request("plain", Host="evil.example"), False),
                "another accept": (here.request("plain", Accept="application/json"), False),
                "a bad cursor": (here.request("plain", query="?after=x"), False),
                "a bad id": (here.request("plain", Last_Event_ID="x"), False),
                "a parameter": (here.request("plain", query="?include=output"), False),
                "a ticket": (here.request("plain", query="?ticket=x"), False),
                "an origin": (here.request("plain", Origin="http://evil.example"), False),
                "an ended run": (here.request("plain", run=ended), False),
            }
            for name, (request, expected) in cases.items():
                assert (here.direct.stream_of(read(request)) is not None) == expected, name
        await here.until(subscribers=0)
        assert here.direct.stream_of(read(here.request("plain"))) is None, "nobody follows it any more"


async def ask(here: Place, request: bytes) -> None:
    client = Stream(await trio.open_tcp_stream("127.0.0.1", here.port))
    async with client:
        await client.send(request)
        await client.until(b"\r\n\r\n")


async def test_a_token_has_as_many_streams_as_it_may_either_way() -> None:
    async with place() as here:
        sessions = here.direct._authenticator.sessions
        async with await here.open("direct"):
            await here.until(riders=1)
            claims = Claims("me", 9e9, "", frozenset({"read"}), "*", ())
            assert sessions.has_room(claims)
            sessions._limit = 1
            assert here.direct.stream_of(read(here.request("plain"))) is None
            client = Stream(await trio.open_tcp_stream("127.0.0.1", here.port))
            async with client:
                await client.send(here.request("plain"))
                await client.until(b"stream.busy")


async def test_a_run_that_ended_is_asked_for_in_the_store() -> None:
    async with place() as here:
        async with await here.open("direct") as client:
            await here.until(riders=1)
            assert here.engine.hub.followed(here.run.id) is not None
            here.engine.end(here.run, RunStatus.FAILED)
            assert here.engine.hub.followed(here.run.id) is None
            await client.until(b"stream.end")
