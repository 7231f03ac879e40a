"""A real engine over a real store, with runners played by hand at real pipes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from gateway.book import Book
from gateway.engine import Engine
from gateway.fanout import Hub
from gateway.store.rows import EventRow, RunRow
from gateway.store.sqlite import SqliteStore
from gateway.submission import Catalogue, Submission
from supervisor.runners import open_ends
from taskkit import seqpacket
from taskkit.identifiers import new_run_id
from taskkit.settings import LimitSettings, PoolSettings, Settings
from taskkit.wire.codec import pack_runner_frame, unpack
from taskkit.wire.messages import (
    Cause,
    Drained,
    Event,
    Finished,
    Hello,
    Message,
    Order,
    RunnerMessage,
    RunnerSpec,
    RunnerUp,
    Start,
    Started,
    TaskInfo,
)

_M = TypeVar("_M", bound=Message)

TASK = TaskInfo(
    name="t.f",
    path="t.tasks.f",
    kind="function",
    parameters={"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False},
    positional=("n",),
)
ROW_TASK = TaskInfo(name="t.Row", path="t.models.Row", kind="model")
SETTINGS = Settings(
    pools={"default": PoolSettings(runners=4), "shared": PoolSettings(runners=4, concurrency=4, runs=9)},
    limits=LimitSettings(cancel_grace_seconds=3.0, kill_grace_seconds=1.0, queued_runs=2_000),
)

#: Seconds for anything that takes milliseconds.
PATIENCE = 20.0


def submission(**changes: Any) -> Submission:
    """Return a submission of a function."""
    values: dict[str, Any] = {
        "id": new_run_id(),
        "task": TASK,
        "args": b"[1]",
        "kwargs": b"{}",
        "row": None,
        "pool": "default",
        "priority": 0,
        "run_after": None,
        "timeout": None,
        "max_attempts": 1,
        "metadata": b"{}",
        "tags": (),
        "subject": "ann",
        "origin": "http",
    }
    return Submission(**values | changes)


class HandRunner:
    """A runner's far ends, and the supervisor's duplicates of the near ones."""

    def __init__(self, id: str = "r1", **spec: Any) -> None:
        self._ends = open_ends()
        values: dict[str, Any] = {"id": id, "pipe_size": self._ends.pipe_size}
        self.spec = RunnerSpec(**values | spec)
        self.events, self.output, orders = self._ends.far
        self._orders = socket.socket(fileno=orders)
        self._orders.setblocking(False)
        self._alive = True
        self.seq = 0
        self.told: list[Order] = []

    def up(self, engine: Engine, *, adopted: bool = False) -> None:
        """Introduce it to a gateway, with fresh duplicates of the near ends."""
        fds = [os.dup(fd) for fd in self._ends.near]
        engine.runner_up(RunnerUp(spec=self.spec, pid=77, started_at=1.0, adopted=adopted), fds)

    def frame(self, message: RunnerMessage) -> bytes:
        """Return the next frame without writing it."""
        self.seq += 1
        return pack_runner_frame(message, self.seq)

    def say(self, *messages: RunnerMessage) -> None:
        """Write frames, all by one write."""
        self.write(b"".join(self.frame(message) for message in messages))

    def write(self, data: bytes) -> None:
        """Write bytes to the events pipe, which must have room for them."""
        assert os.write(self.events, data) == len(data)

    def print(self, text: str) -> None:
        """Write bytes to the output pipe."""
        os.write(self.output, text.encode())

    def hello(self) -> None:
        """Say hello."""
        self.say(Hello(runner=self.spec.id, pid=77))

    def orders(self) -> list[Order]:
        """Return every order so far."""
        while True:
            try:
                received = seqpacket.receive(self._orders)
            except BlockingIOError:
                return self.told
            if received is None:
                return self.told
            self.told.append(unpack(received[0], Order))

    async def ordered(self, kind: type[_M], number: int = 1) -> _M:
        """Return the `number`-th order of that kind."""
        with trio.fail_after(PATIENCE):
            while True:
                found = [order for order in self.orders() if isinstance(order, kind)]
                if len(found) >= number:
                    return found[number - 1]
                await trio.lowlevel.wait_readable(self._orders)

    async def started(self, number: int = 1) -> str:
        """Take the `number`-th start, say so; return its token."""
        start = await self.ordered(Start, number)
        self.say(Started(token=start.token))
        return start.token

    def tick(self, token: str, *numbers: int) -> None:
        """Say one event per number."""
        self.say(*(Event(token=token, type="tick", data=b'{"n":%d}' % n) for n in numbers))

    def finish(self, token: str, **changes: Any) -> None:
        """Say that the attempt has ended, with markers around what was printed."""
        self.print(f"\n\x1eE{token}\x1f\n")
        values: dict[str, Any] = {"token": token, "ending": "returned"}
        self.say(Finished(**values | changes))

    def die(self, engine: Engine | None, kind: str = "signal", **changes: Any) -> None:
        """Close the far ends, as death does; have the supervisor tell of it."""
        if self._alive:
            self._alive = False
            os.close(self.events)
            os.close(self.output)
            self._orders.close()
        if engine is not None:
            engine.book.runner_exited(self.spec.id, Cause(kind=kind, **changes))
            engine.wake()

    def close(self) -> None:
        """Let go of everything."""
        self.die(None)
        self._ends.close_near()


@dataclass
class Gate:
    """One gateway's inside, and what it told its supervisor."""

    engine: Engine
    store: SqliteStore
    hub: Hub
    told: list[Message] = field(default_factory=list)

    async def until(self, predicate: Callable[[], Any]) -> None:
        """Wait, round by round, until `predicate` is true; what follows a round is looked for a little later."""
        with trio.fail_after(PATIENCE):
            while not predicate():
                with trio.move_on_after(0.01):
                    await self.engine.round_over()

    async def submit(self, **changes: Any) -> RunRow:
        """Make a run."""
        with trio.fail_after(PATIENCE):
            run, _ = await self.engine.submit(submission(**changes))
        return run

    async def ended(self, run: RunRow) -> RunRow:
        """Wait for the run's end; return it as the store has it."""
        await self.until(lambda: self.engine.book.find(run.id) is None)
        await self.engine.flush()  # the book knows of it before the store does
        row = await self.store.run(run.id)
        assert row is not None
        return row

    async def drained(self, runner: HandRunner) -> None:
        """Wait until the gateway has let go of a dead runner."""
        await self.until(lambda: Drained(runner=runner.spec.id) in self.told)

    async def events(self, run: RunRow) -> list[EventRow]:
        """Return the run's events in the store; offsets are 1, 2, 3 …"""
        rows = await self.store.events(run.no, 0, 100_000, 1 << 30)
        assert [row.offset for row in rows] == list(range(1, len(rows) + 1))
        return rows

    async def names(self, run: RunRow) -> list[str]:
        """Return the names of the run's events."""
        return [row.type for row in await self.events(run)]

    async def ticks(self, run: RunRow) -> list[int]:
        """Return the numbers of the run's ticks."""
        return [msgspec.json.decode(row.data)["n"] for row in await self.events(run) if row.type == "tick"]

    async def lines(self, run: RunRow) -> list[str]:
        """Return what the run printed."""
        return [row.text for row in await self.store.outputs(run.no, 0, 100_000)]

    async def ran(self, runner: HandRunner, number: int = 1, **changes: Any) -> tuple[RunRow, str]:
        """Submit a run and have the runner start it; return (run, token)."""
        run = await self.submit(**changes)
        token = await runner.started(number)
        await self.until(lambda: run.status == "RUNNING")
        return run, token

    def of(self, kind: type[_M]) -> list[_M]:
        """Return what the supervisor was told, of one kind."""
        return [message for message in self.told if isinstance(message, kind)]


@asynccontextmanager
async def gate(
    directory: Path,
    *,
    settings: Settings = SETTINGS,
    adopting: Sequence[HandRunner] = (),
    running: bool = True,
    wrap: Callable[[SqliteStore], Any] = lambda store: store,
) -> AsyncIterator[Gate]:
    """Give a gateway over the store in `directory`, at work unless `running` is false."""
    (directory / "blobs").mkdir(exist_ok=True)
    store = SqliteStore(directory, boot_id="boot")
    opened = await store.open()
    hub = Hub()
    told: list[Message] = []
    engine = Engine(
        store=wrap(store),
        book=Book(settings, opened, [runner.spec.id for runner in adopting], 1000.0),
        hub=hub,
        catalogue=Catalogue([TASK, ROW_TASK]),
        settings=settings,
        url="http://test",
        versions={},
        blobs=directory / "blobs",
        control=told.append,
    )
    try:
        async with trio.open_nursery() as nursery:
            for runner in adopting:
                runner.up(engine, adopted=True)
            if running:
                nursery.start_soon(engine.run)
            yield Gate(engine, store, hub, told)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE):
            await store.close()
        engine.close()
