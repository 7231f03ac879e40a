"""A run that was left alone is cancelled if its task wants that; nothing else is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from gateway.attendance import REASON, RETRY_SECONDS, RETURN_SECONDS, Attendance
from gateway.engine import Engine
from gateway.fanout import Hub
from gateway.store.rows import RunRow
from gateway.submission import Catalogue
from taskkit.errors import NotWritable
from taskkit.settings import LimitSettings, Settings
from tests.unit.gateway import gate as gates
from tests.unit.gateway.fakes import StubEngine, exchange
from tests.unit.gateway.gate import SETTINGS, gate

GRACE = 10.0
SHY = msgspec.structs.replace(gates.TASK, name="t.shy", on_disconnect="cancel")


@dataclass
class StubBook:
    """Open runs, and what was decided about them."""

    runs: dict[int, RunRow] = field(default_factory=dict)
    cancelled: list[tuple[int, str]] = field(default_factory=list)

    def followed(self, no: int) -> None:
        self.runs[no].followed = True

    def cancel(self, run: RunRow, grace: float, now: float, reason: str) -> None:
        self.cancelled.append((run.no, reason))
        run.cancelling = True


@dataclass
class Stub:
    """The part of an engine that attendance needs; `decide` is at once."""

    hub: Hub = field(default_factory=Hub)
    book: StubBook = field(default_factory=StubBook)
    catalogue: Catalogue = field(default_factory=lambda: Catalogue([SHY, gates.TASK]))
    settings: Settings = field(
        default_factory=lambda: Settings(limits=LimitSettings(disconnect_grace_seconds=GRACE))
    )
    broken: bool = False

    def __post_init__(self) -> None:
        self.attendance = Attendance(cast("Engine", self))
        self.hub.audience = self.attendance

    def request(self, decide: Callable[[], Any]) -> None:
        decide()

    def check_store(self) -> None:
        if self.broken:
            raise NotWritable("no space left on device")

    async def decide(self, decide: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return decide()

    def start(self, task: str = SHY.name, **changes: Any) -> int:
        no = len(self.book.runs) + 1
        self.book.runs[no] = RunRow(no=no, id=f"run-{no}", task=task, **changes)
        self.hub.opened(no, 0)
        return no

    @property
    def cancelled(self) -> list[int]:
        return [no for no, _ in self.book.cancelled]


@asynccontextmanager
async def attending(stub: Stub) -> AsyncIterator[Stub]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stub.attendance.run)
        yield stub
        nursery.cancel_scope.cancel()


async def test_a_run_is_cancelled_a_grace_after_its_last_subscriber_has_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attending(Stub()) as stub:
        run = stub.start()
        with stub.hub.attach(run), stub.hub.attach(run):
            await trio.sleep(3 * GRACE)
        await trio.sleep(GRACE - 0.1)
        assert stub.cancelled == []
        assert stub.attendance.deserted == 1
        await trio.sleep(0.2)
        assert stub.book.cancelled == [(run, REASON)]
        await trio.sleep(5 * GRACE)
        assert stub.cancelled == [run], "once"
        assert stub.attendance.deserted == 0


async def test_not_if_one_comes_back_and_anew_when_that_one_leaves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attending(Stub()) as stub:
        run = stub.start()
        for _ in range(3):
            with stub.hub.attach(run):
                await trio.sleep(GRACE)
            await trio.sleep(GRACE - 1)
        assert stub.cancelled == []
        await trio.sleep(2)
        assert stub.cancelled == [run]


async def test_never_if_nobody_ever_came_or_only_by_a_tag(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        run = stub.start()
        with stub.hub.attach(run, counted=False):
            await trio.sleep(1)
        await trio.sleep(10 * GRACE)
        assert stub.cancelled == []


async def test_never_against_the_tasks_will_or_behind_its_end(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        willing, gone, over = stub.start(gates.TASK.name), stub.start("t.gone"), stub.start()
        for run in (willing, gone, over):
            with stub.hub.attach(run):
                await trio.sleep(1)
        del stub.book.runs[over]
        stub.hub.ended(over)
        await trio.sleep(10 * GRACE)
        assert stub.cancelled == []


async def test_one_that_is_being_cancelled_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        run = stub.start()
        with stub.hub.attach(run):
            await trio.sleep(1)
        stub.book.runs[run].cancelling = True
        await trio.sleep(10 * GRACE)
        assert stub.cancelled == []


async def test_each_run_has_its_own_time(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        first, second = stub.start(), stub.start()
        with stub.hub.attach(second):
            with stub.hub.attach(first):
                await trio.sleep(1)
            await trio.sleep(5)
        await trio.sleep(GRACE - 4)
        assert stub.cancelled == [first]
        await trio.sleep(5)
        assert stub.cancelled == [first, second]


async def test_a_gateway_that_ends_takes_subscribers_along_and_cancels_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attending(Stub()) as stub:
        run, left = stub.start(), stub.start()
        with stub.hub.attach(left):
            await trio.sleep(1)
        with stub.hub.attach(run):
            stub.hub.end_streams()
            await trio.sleep(1)
        await trio.sleep(10 * GRACE)
        assert stub.cancelled == []


async def test_the_next_gateway_gives_those_that_had_subscribers_the_grace_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with attending(Stub()) as stub:
        left, back, never = stub.start(followed=True), stub.start(followed=True), stub.start()
        stub.attendance.found(stub.book.runs.values())
        await trio.sleep(RETURN_SECONDS)
        with stub.hub.attach(back):
            await trio.sleep(GRACE - 0.1)
            assert stub.cancelled == []
            await trio.sleep(0.2)
            assert stub.cancelled == [left]
            await trio.sleep(10 * GRACE)
        assert stub.cancelled == [left]
        assert never not in stub.cancelled


async def test_the_store_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        run, other = stub.start(), stub.start(gates.TASK.name)
        for _ in range(2):
            with stub.hub.attach(run), stub.hub.attach(other):
                await trio.sleep(1)
        assert [row.followed for row in stub.book.runs.values()] == [True, False]


async def test_a_store_that_cannot_be_written_delays_it(autojump_clock: trio.testing.MockClock) -> None:
    async with attending(Stub()) as stub:
        run = stub.start()
        with stub.hub.attach(run):
            await trio.sleep(1)
        stub.broken = True
        await trio.sleep(10 * GRACE)
        assert stub.cancelled == []
        stub.broken = False
        await trio.sleep(RETRY_SECONDS + 0.1)
        assert stub.cancelled == [run]


async def test_who_comes_while_it_is_decided_is_in_time(autojump_clock: trio.testing.MockClock) -> None:
    class Slow(Stub):
        async def decide(self, decide: Callable[[], Any]) -> Any:
            await trio.sleep(1)
            return decide()

    async with attending(Slow()) as stub:
        run = stub.start()
        with stub.hub.attach(run):
            await trio.sleep(1)
        await trio.sleep(GRACE + 0.5)
        with stub.hub.attach(run):
            await trio.sleep(10 * GRACE)
            assert stub.cancelled == []


@dataclass
class Counts:
    """An audience that writes down who came and left."""

    said: list[tuple[str, int]] = field(default_factory=list)

    def came(self, run: int) -> None:
        self.said.append(("came", run))

    def left(self, run: int) -> None:
        self.said.append(("left", run))


@pytest.mark.parametrize(
    ("path", "accept", "counts"),
    [
        ("/api/v1/runs/{run}/events", "text/event-stream", True),
        ("/api/v1/runs/{run}/events", "application/x-ndjson", True),
        ("/api/v1/runs/{run}/events", "text/plain", True),
        ("/api/v1/runs/{run}/events?wait=5", "application/json", True),
        ("/api/v1/runs/{run}/events", "application/json", False),
        ("/api/v1/events?run={run}", "text/event-stream", True),
        ("/api/v1/events?tag=t", "text/event-stream", False),
        ("/api/v1/runs/{run}", "application/json", False),
    ],
)
async def test_who_is_a_subscriber(
    autojump_clock: trio.testing.MockClock, path: str, accept: str, counts: bool
) -> None:
    engine = StubEngine()
    run = engine.start(tags=("t",))
    engine.hub.audience = audience = Counts()
    async with exchange(engine, path.format(run=run.id), accept=accept) as one:
        await trio.sleep(1)
        one.leave()
        await one.until()
    assert audience.said == ([("came", 1), ("left", 1)] if counts else [])


async def test_over_a_real_engine_the_run_ends_and_the_store_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "TASK", SHY)
    limits = msgspec.structs.replace(SETTINGS.limits, disconnect_grace_seconds=0.05)
    async with gate(tmp_path, settings=SETTINGS.replace(limits=limits)) as g:
        alone, followed, kept = [await g.submit() for _ in range(3)]
        with g.hub.attach(kept.no):
            with g.hub.attach(followed.no):
                pass
            await g.until(lambda: g.engine.book.find(followed.id) is None)
            await g.engine.flush()
            row = await g.store.run(followed.id)
            assert row is not None
            assert row.status == "CANCELLED"
            assert (await g.names(followed)) == ["stream.end"]
            for run, expected in ((alone, False), (kept, True)):
                found = await g.store.run(run.id)
                assert found is not None
                assert (found.status, found.followed) == ("READY", expected)
    async with gate(tmp_path) as g:
        assert g.engine.statistics()["deserted"] == 1
