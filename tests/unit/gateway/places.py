"""A gateway's streams on a port, without the rest of it, for tests over real sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from gateway import plain
from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.bounds import ServeLimits
from gateway.direct import Direct
from gateway.retention import Retention
from gateway.serve import serve
from gateway.store.rows import RunRow
from gateway.tally import DoorTally
from taskkit.settings import LimitSettings, Settings
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
async def place(grace: float = 0.5, origins: Sequence[str] = ()) -> AsyncIterator[Place]:
    """Serve the streams of an engine with one run; nobody is refused for having failed before."""
    settings = Settings(cors_origins=list(origins), limits=LimitSettings(auth_failures=0))
    engine = StubEngine(settings=settings)
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


def read(data: bytes, most: int = 16_384) -> plain.Request:
    """Return a request that is plain."""
    request = plain.read(bytearray(data), most)
    assert request is not None
    return request
