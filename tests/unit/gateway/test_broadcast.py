"""The fast path: whoever keeps up is written to by one loop, whoever does not goes on alone, with nothing lost."""

from __future__ import annotations

import contextlib
import math
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway import sse
from gateway.broadcast import HEARTBEAT_SECONDS, LOOK, TURN, Seat
from gateway.fanout import Hub, Subscription
from gateway.store.rows import EventRow
from tests.streams import SseDecoder

RUN = 1


class Client:
    """Both ends of one connection, and what has been read of it. `http_version` as a Peer has it."""

    def __init__(self, version: str = "1.1", buffer: int = 0) -> None:
        self.http_version = version
        self.ours, self.theirs = socket.socketpair()
        if buffer:
            self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.received = b""

    def fileno(self) -> int:
        return self.ours.fileno()

    def read(self) -> bytes:
        """Return everything that has come so far."""
        try:
            while data := self.theirs.recv(65536):
                self.received += data
        except BlockingIOError:
            pass
        return self.received

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class Rider:
    """A subscriber on its ride; a context manager. `seat.off` sets `off`."""

    def __init__(
        self,
        world: World,
        subscription: Subscription,
        fd: int,
        *,
        framed: bool,
        after: int = 0,
        life: float = math.inf,
    ) -> None:
        self._broadcast = world.hub.broadcast
        self._fd = fd
        self.off = trio.Event()
        ends_at = trio.current_time() + life
        self.seat = Seat(RUN, subscription, after, framed=framed, ends_at=ends_at, off=self.off.set)

    def __enter__(self) -> Rider:
        self._broadcast.board(self.seat, self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._broadcast.leave(self.seat)

    @property
    def after(self) -> int:
        return self.seat.after

    @property
    def rest(self) -> memoryview | None:
        return self.seat.rest

    async def ride(self) -> None:
        """Return when it has to go on by itself."""
        await self.off.wait()


def unchunked(data: bytes) -> bytes:
    """Return the content of whole chunks."""
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        content += data[: int(size, 16)]
        assert data[int(size, 16) :][:2] == b"\r\n"
        data = data[int(size, 16) + 2 :]
    return content


def offsets(data: bytes) -> list[int]:
    return [int(event.id) for event in SseDecoder().receive(data)]


class World:
    """A hub whose broadcast runs, with one run."""

    def __init__(self, fast_path: bool = True) -> None:
        self.hub = Hub(fast_path=fast_path)
        self.hub.opened(RUN, 0)
        self.tail = 0

    def say(self, *datas: bytes, type: str = "tick") -> None:
        rows = []
        for data in datas:
            self.tail += 1
            rows.append(EventRow(self.tail, RUN, self.tail, 1, type, data, 0.0))
        self.hub.publish(RUN, rows)

    def seat(
        self, subscription: Subscription, client: Client, after: int = 0, life: float = math.inf
    ) -> Rider:
        framed = client.http_version != "1.0"
        return Rider(self, subscription, client.fileno(), framed=framed, after=after, life=life)


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    made: list[Client] = []
    yield made
    for client in made:
        client.close()


@asynccontextmanager
async def broadcasting(fast_path: bool = True, patience: float = 20.0) -> AsyncIterator[World]:
    world = World(fast_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.hub.broadcast.run)
        with trio.fail_after(patience):
            yield world
        nursery.cancel_scope.cancel()


async def test_riders_get_the_same_framed_bytes(clients: list[Client]) -> None:
    clients += [Client(), Client("1.0")]
    async with broadcasting() as world:
        with (
            world.hub.attach(RUN) as subscription,
            world.seat(subscription, clients[0]) as modern,
            world.seat(subscription, clients[1]) as old,
        ):
            world.say(b"1", b"2")
            await trio.testing.wait_all_tasks_blocked()
            content = clients[1].read()
            assert content == sse.event_bytes(1, "tick", b"1") + sse.event_bytes(2, "tick", b"2")
            assert clients[0].read() == sse.chunk(content)
            assert modern.after == old.after == 2
            assert world.hub.statistics()["riders"] == 2
            assert world.hub.statistics()["fast_deliveries"] == 2
            assert world.hub.broadcast.events == 4
        assert world.hub.broadcast.riders == 0


async def test_what_was_said_before_boarding_is_brought(clients: list[Client]) -> None:
    clients.append(Client("1.0"))
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription:
            world.say(b"1", b"2", b"3")
            with world.seat(subscription, clients[0], after=1):
                await trio.testing.wait_all_tasks_blocked()
                assert offsets(clients[0].read()) == [2, 3]


async def test_the_end_is_left_to_the_owner(clients: list[Client]) -> None:
    clients.append(Client("1.0"))
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription, world.seat(subscription, clients[0]) as seat:
            world.say(b"1")
            world.say(b"{}", type=sse.STREAM_END)
            world.hub.ended(RUN)
            await seat.ride()
            assert (seat.after, seat.rest) == (1, None)
            assert offsets(clients[0].read()) == [1]


async def test_a_client_that_does_not_take_all_goes_on_alone(clients: list[Client]) -> None:
    clients += [Client("1.0", buffer=2048), Client("1.0")]
    async with broadcasting() as world:
        with (
            world.hub.attach(RUN) as subscription,
            world.seat(subscription, clients[0]) as slow,
            world.seat(subscription, clients[1]) as live,
        ):
            large = b'"' + b"x" * 40_000 + b'"'
            world.say(large)
            await slow.ride()
            assert slow.rest is not None
            assert slow.after == 1
            assert clients[0].read() + bytes(slow.rest) == clients[1].read()
            world.say(b"2")
            await trio.testing.wait_all_tasks_blocked()
            assert live.after == 2
            assert slow.after == 1, "nobody writes behind what it still has to write"
            assert world.hub.statistics()["shortfalls"] == 1


async def test_a_full_socket_takes_nothing_and_loses_nothing(clients: list[Client]) -> None:
    clients.append(Client("1.0", buffer=2048))
    with contextlib.suppress(BlockingIOError):
        while True:
            clients[0].ours.send(b":" * 1024)
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription, world.seat(subscription, clients[0]) as seat:
            world.say(b"1")
            await seat.ride()
            assert (seat.after, seat.rest) == (0, None)


async def test_a_closed_connection_only_ends_its_own_ride(clients: list[Client]) -> None:
    clients += [Client("1.0"), Client("1.0")]
    async with broadcasting() as world:
        with (
            world.hub.attach(RUN) as subscription,
            world.seat(subscription, clients[0]) as gone,
            world.seat(subscription, clients[1]),
        ):
            clients[0].ours.close()
            world.say(b"1")
            await gone.ride()
            await trio.testing.wait_all_tasks_blocked()
            assert offsets(clients[1].read()) == [1]


async def test_what_has_left_the_ring_is_the_owners_to_read(clients: list[Client]) -> None:
    clients.append(Client("1.0"))
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription:
            world.say(*[b"x" * 600] * 2_000)
            with world.seat(subscription, clients[0], after=3) as seat:
                await seat.ride()
                assert seat.after == 3


async def test_a_shutdown_and_a_ride_that_is_off_end_at_once(clients: list[Client]) -> None:
    clients.append(Client("1.0"))
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription:
            with world.seat(subscription, clients[0]) as seat:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(seat.ride)
                    await trio.testing.wait_all_tasks_blocked()
                    world.hub.end_streams()
            with world.seat(subscription, clients[0]) as seat:
                await seat.ride()


async def test_without_the_fast_path_nobody_rides(clients: list[Client]) -> None:
    clients.append(Client())
    async with broadcasting(fast_path=False) as world:
        with world.hub.attach(RUN) as subscription, world.seat(subscription, clients[0]) as seat:
            world.say(b"1")
            await seat.ride()
            assert (seat.after, clients[0].read()) == (0, b"")
            assert world.hub.broadcast.riders == 0


@pytest.fixture
def sink() -> Iterator[int]:
    """Give a descriptor that takes everything."""
    with Path("/dev/null").open("wb") as file:
        yield file.fileno()


async def test_others_have_their_turn_among_many_riders(sink: int) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with broadcasting() as world, trio.open_nursery() as nursery:
        with world.hub.attach(RUN) as subscription:
            seats = [Rider(world, subscription, sink, framed=True) for _ in range(TURN * 6)]
            with contextlib.ExitStack() as stack:
                for seat in seats:
                    stack.enter_context(seat)
                nursery.start_soon(count)
                world.say(b"1")
                while seats[0].after == 0:
                    await trio.lowlevel.checkpoint()
                # Seen one round of trio late at most, so two turns are over, four to come; each round runs every task.
                before = turns
                assert seats[-1].after == 0
                while seats[-1].after == 0:
                    await trio.lowlevel.checkpoint()
                assert turns >= before + 2
        nursery.cancel_scope.cancel()


async def test_union_is_exact_whatever_the_sockets_take(clients: list[Client], rng: random.Random) -> None:
    """Owners change between riding and writing alone, as RunStream does; readers stall at random."""
    total = 1_500
    clients += [Client(rng.choice(["1.0", "1.1"]), buffer=rng.choice([2048, 4096, 65536])) for _ in range(12)]

    async def own(world: World, client: Client) -> None:
        outlet = trio.socket.from_stdlib_socket(client.ours.dup())
        with world.hub.attach(RUN) as subscription, outlet:
            after = 0

            async def write(rest: bytes | memoryview) -> None:
                rest = memoryview(rest)
                while rest:
                    rest = rest[await outlet.send(rest) :]

            while after < total:
                with world.seat(subscription, client, after) as seat, trio.move_on_after(rng.random() * 0.01):
                    await seat.ride()
                after = seat.after
                if seat.rest is not None:
                    await write(seat.rest)
                entries = subscription.batch(after, 65536) or []
                if entries:
                    data = b"".join(entry.sse for entry in entries)
                    await write(sse.chunk(data) if seat.seat.framed else data)
                    after = entries[-1].offset

    async def read(client: Client) -> None:
        while True:
            client.read()
            await trio.sleep(rng.random() * 0.004)

    async with broadcasting() as world, trio.open_nursery() as readers:
        async with trio.open_nursery() as owners:
            for client in clients:
                owners.start_soon(own, world, client)
                readers.start_soon(read, client)
            while world.tail < total:
                await trio.sleep(rng.random() * 0.002)
                count = min(rng.randint(1, 20), total - world.tail)
                world.say(*[b'"%s"' % (b"x" * rng.randint(0, 400)) for _ in range(count)])
        readers.cancel_scope.cancel()
    for client in clients:
        data = client.read()
        assert offsets(data if client.http_version == "1.0" else unchunked(data)) == list(range(1, total + 1))
    assert world.hub.broadcast.deliveries > total / 10
    assert world.hub.broadcast.shortfalls > 0


async def test_silence_is_broken_for_all_who_ride(
    clients: list[Client], autojump_clock: trio.testing.MockClock
) -> None:
    clients += [Client("1.0"), Client("1.1")]
    async with broadcasting(patience=1_000.0) as world:
        with (
            world.hub.attach(RUN) as subscription,
            world.seat(subscription, clients[0]),
            world.seat(subscription, clients[1]),
        ):
            await trio.sleep(HEARTBEAT_SECONDS - 1)
            world.say(b"1")
            await trio.sleep(HEARTBEAT_SECONDS - 1)
            assert clients[0].read().count(sse.HEARTBEAT) == 0, "something was said"
            await trio.sleep(2)
            assert clients[0].read().endswith(b"\n\n" + sse.HEARTBEAT)
            assert clients[1].read().endswith(sse.chunk(sse.HEARTBEAT))
            await trio.sleep(HEARTBEAT_SECONDS * 2)
            assert clients[0].read().count(sse.HEARTBEAT) == 3


async def test_a_rider_goes_on_alone_when_its_time_is_over(
    clients: list[Client], autojump_clock: trio.testing.MockClock
) -> None:
    clients += [Client("1.0"), Client("1.0"), Client("1.0")]
    async with broadcasting(patience=1_000.0) as world:
        with (
            world.hub.attach(RUN) as subscription,
            world.seat(subscription, clients[0], life=300.0) as late,
            world.seat(subscription, clients[1], life=5.0) as soon,
            world.seat(subscription, clients[2], life=100.0) as later,
        ):
            began = trio.current_time()
            for rider, life in ((soon, 5.0), (later, 100.0), (late, 300.0)):
                await rider.ride()
                assert life <= trio.current_time() - began <= life + 2 * LOOK


async def test_a_full_socket_gets_no_heartbeat_and_goes_on_alone(
    clients: list[Client], autojump_clock: trio.testing.MockClock
) -> None:
    clients.append(Client("1.0", buffer=2048))
    with contextlib.suppress(BlockingIOError):
        while True:
            clients[0].ours.send(b":" * 1024)
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription, world.seat(subscription, clients[0]) as rider:
            await rider.ride()
            assert rider.rest is None


async def test_one_rider_of_a_run_waits_for_a_turn_of_another_run_at_most(sink: int) -> None:
    """Whoever speaks to a crowd holds nobody up who listens to something else."""
    other = 2
    async with broadcasting() as world:
        world.hub.opened(other, 0)
        with (
            world.hub.attach(RUN) as crowded,
            world.hub.attach(other) as quiet,
            contextlib.ExitStack() as stack,
        ):
            crowd = [stack.enter_context(Rider(world, crowded, sink, framed=True)) for _ in range(TURN * 8)]
            alone = Seat(other, quiet, 0, framed=True, ends_at=math.inf, off=lambda: None)
            world.hub.broadcast.board(alone, sink)
            stack.callback(world.hub.broadcast.leave, alone)
            world.say(b"1")
            world.hub.publish(other, [EventRow(9, other, 1, 1, "tick", b"1", 0.0)])
            while alone.after == 0:
                await trio.lowlevel.checkpoint()
            # A turn, then its own; the rest is what was written until this task has heard of it.
            assert sum(rider.after for rider in crowd) <= TURN * 3
            while crowd[-1].after == 0:
                await trio.lowlevel.checkpoint()


async def test_who_waits_for_a_turn_gets_all_that_was_said_meanwhile(sink: int) -> None:
    async with broadcasting() as world:
        with world.hub.attach(RUN) as subscription, contextlib.ExitStack() as stack:
            crowd = [
                stack.enter_context(Rider(world, subscription, sink, framed=True)) for _ in range(TURN * 3)
            ]
            world.say(b"1")
            while crowd[0].after == 0:
                await trio.lowlevel.checkpoint()
            world.say(b"2")
            while not all(rider.after == 2 for rider in crowd):
                await trio.lowlevel.checkpoint()
            assert world.hub.broadcast.events == len(crowd) * 2
            assert world.hub.broadcast.deliveries < len(crowd) * 2
