"""Messages over a real socket: in order, without waiting, with descriptors that nobody leaks."""

from __future__ import annotations

import array
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import trio
import trio.testing

from taskkit import channel as room
from taskkit import linux, seqpacket
from taskkit.channel import Channel
from taskkit.errors import CorruptFrame, RemoteWireError, UnexpectedMessage
from taskkit.wire.codec import pack
from taskkit.wire.messages import Beat, Deadline, Link, Park, Start

Limit = Callable[[float], AbstractContextManager[trio.CancelScope]]
Words = Link | Park | Beat | Start

#: Fills a socket's buffer in a few messages.
BULK = "x" * 60_000


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


class Pair:
    """A channel with its sender task, and the plain socket at the far end."""

    def __init__(self) -> None:
        ours, self.peer = linux.seqpacket_pair()
        self.peer.setblocking(False)
        self.channel: Channel[Any] = Channel(ours, Words)

    async def read(self) -> tuple[bytes, list[int]]:
        await trio.lowlevel.wait_readable(self.peer)
        found = seqpacket.receive(self.peer)
        assert found is not None
        return found


@pytest.fixture
async def pair(_leaves_nothing: None) -> AsyncIterator[Pair]:
    pair = Pair()
    with pair.peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.channel.run)
            yield pair
            nursery.cancel_scope.cancel()
        pair.channel.close()


def start(number: int, filling: str = "") -> Start:
    return Start(run=filling, attempt=number, token="t", task="t")


async def test_a_message_crosses_with_its_descriptors(pair: Pair, deadline: Limit) -> None:
    other: Channel[Any] = Channel(pair.peer, Words)
    reader, writer = os.pipe()
    pair.channel.send(Link(), [writer])
    os.close(writer)
    with deadline(5):
        message, fds = await other.receive()
    assert message == Link()
    os.write(fds[0], b"through")
    assert os.read(reader, 10) == b"through"
    seqpacket.close_all([reader, *fds])


async def test_what_fits_leaves_without_the_sender_task(deadline: Limit) -> None:
    pair = Pair()  # nobody runs `run`
    for number in range(3):
        pair.channel.send(start(number))
    with deadline(5):
        for number in range(3):
            assert await pair.read() == (pack(start(number)), [])
    pair.channel.close()
    pair.peer.close()


async def test_sending_waits_for_nobody_and_order_stands(
    pair: Pair, deadline: Limit, rng: random.Random
) -> None:
    count = 300
    sizes = [rng.choice([0, 10, 1000, 50_000, 70_000, 200_000]) for _ in range(count)]
    for number, size in enumerate(sizes):  # no await: the peer cannot have read anything
        pair.channel.send(start(number, "x" * size))
    other: Channel[Start] = Channel(pair.peer, Start)
    with deadline(20):
        for number, size in enumerate(sizes):
            message, _ = await other.receive()
            assert (message.attempt, len(message.run)) == (number, size)


async def test_descriptors_survive_the_queue_though_the_sender_closes_its_own(
    pair: Pair, deadline: Limit
) -> None:
    readers = []
    for number in range(50):
        reader, writer = os.pipe()
        os.write(writer, str(number).encode())
        pair.channel.send(start(number, BULK), [reader])
        seqpacket.close_all([reader, writer])
        readers.append(number)
    with deadline(20):
        for number in readers:
            _, fds = await pair.read()
            assert os.read(fds[0], 10) == str(number).encode()
            seqpacket.close_all(fds)


async def test_two_that_only_send_do_not_block_each_other(deadline: Limit) -> None:
    left, right = linux.seqpacket_pair()
    channels: list[Channel[Start]] = [Channel(left, Start), Channel(right, Start)]
    count = 100
    with deadline(20):
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(channel.run)
            for number in range(count):
                for channel in channels:
                    channel.send(start(number, BULK))
            for channel in channels:
                for number in range(count):
                    message, _ = await channel.receive()
                    assert message.attempt == number
            nursery.cancel_scope.cancel()
    for channel in channels:
        channel.close()


async def test_a_peer_that_never_reads_is_given_up(
    pair: Pair, deadline: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_QUEUED", 20)
    fd = os.memfd_create("passenger")
    sent = 0
    while not pair.channel.broken:
        pair.channel.send(start(sent, BULK), [fd])
        sent += 1
        assert sent < 1000
    os.close(fd)
    assert sent > 20
    assert os.fstat(pair.peer.fileno())
    with deadline(5), pytest.raises(trio.EndOfChannel):  # whoever listens here hears of it
        await pair.channel.receive()
    pair.channel.send(Beat())  # dropped


async def test_the_end_of_the_peer_ends_receiving(pair: Pair, deadline: Limit) -> None:
    seqpacket.send(pair.peer, pack(Beat()))
    pair.peer.close()
    with deadline(5):
        assert await pair.channel.receive() == (Beat(), [])
        with pytest.raises(trio.EndOfChannel):
            await pair.channel.receive()


async def test_sending_to_a_peer_that_has_gone_is_no_error(pair: Pair, deadline: Limit) -> None:
    pair.peer.close()
    fd = os.memfd_create("passenger")
    for _ in range(3):
        pair.channel.send(Link(), [fd])
    os.close(fd)
    assert pair.channel.broken
    with deadline(5), pytest.raises(trio.EndOfChannel):
        await pair.channel.receive()


async def test_a_peer_that_dies_with_a_full_queue_leaves_no_descriptors(pair: Pair, deadline: Limit) -> None:
    fd = os.memfd_create("passenger")
    for number in range(30):
        pair.channel.send(start(number, BULK), [fd])
    os.close(fd)
    await trio.testing.wait_all_tasks_blocked()
    pair.peer.close()
    with deadline(5), pytest.raises(trio.EndOfChannel):
        await pair.channel.receive()
    with deadline(5):
        while not pair.channel.broken:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        (b"garbage", RemoteWireError),
        (b"\x00\xc1", CorruptFrame),
        (b"\x00", CorruptFrame),
        (b"\x00" + pack(Deadline(runner="r", token="t", kind="k", after=1, grace=1)), UnexpectedMessage),
        (b"\x00\x80", UnexpectedMessage),
        (b"\x01", RemoteWireError),
    ],
)
async def test_garbage_is_the_peers_fault_and_leaks_none_of_its_descriptors(
    pair: Pair, deadline: Limit, packet: bytes, error: type[RemoteWireError]
) -> None:
    fd = os.memfd_create("passenger")
    pair.peer.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd, fd]))])
    os.close(fd)
    with deadline(5), pytest.raises(error):
        await pair.channel.receive()


async def test_a_good_message_after_garbage_is_still_read(pair: Pair, deadline: Limit) -> None:
    pair.peer.send(b"garbage")
    seqpacket.send(pair.peer, pack(Beat()))
    with deadline(5):
        with pytest.raises(RemoteWireError):
            await pair.channel.receive()
        assert await pair.channel.receive() == (Beat(), [])


async def test_a_cancelled_receive_loses_nothing(pair: Pair, deadline: Limit) -> None:
    with trio.move_on_after(0):
        await pair.channel.receive()
    seqpacket.send(pair.peer, pack(Beat()))
    with deadline(5):
        assert await pair.channel.receive() == (Beat(), [])


async def test_closing_wakes_our_own_receiver_with_an_end(pair: Pair, deadline: Limit) -> None:
    with deadline(5):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.EndOfChannel):
                    await pair.channel.receive()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            pair.channel.close()
        with pytest.raises(trio.EndOfChannel):
            await pair.channel.receive()


async def test_closing_while_the_sender_task_waits_for_room_harms_nobody(pair: Pair, deadline: Limit) -> None:
    fd = os.memfd_create("passenger")
    for number in range(30):
        pair.channel.send(start(number, BULK), [fd])
    os.close(fd)
    await trio.testing.wait_all_tasks_blocked()  # the sender task waits for the peer
    pair.channel.close()
    pair.channel.close()  # again: nothing happens
    await trio.testing.wait_all_tasks_blocked()


async def test_the_peer_sees_our_end_after_what_had_left(pair: Pair, deadline: Limit) -> None:
    pair.channel.send(Beat())
    pair.channel.close()
    with deadline(5):
        assert await pair.read() == (pack(Beat()), [])
        await trio.lowlevel.wait_readable(pair.peer)
    assert seqpacket.receive(pair.peer) is None


async def test_what_is_there_is_taken_in_at_once_and_returned_one_by_one(pair: Pair) -> None:
    for number in range(100):
        seqpacket.send(pair.peer, pack(Start(run=str(number), attempt=1, token="t", task="t.f")))
    seqpacket.send(pair.peer, b"\xc1")
    assert pair.channel.is_calm
    for number in range(100):
        message, _ = await pair.channel.receive()
        assert message.run == str(number)
        assert pair.channel.size == len(pack(message))
    with pytest.raises(RemoteWireError):
        await pair.channel.receive()


async def test_what_was_taken_in_is_neither_calm_nor_leaked_at_the_end(pair: Pair) -> None:
    for _ in range(3):
        fd = os.dup(2)
        seqpacket.send(pair.peer, pack(Link()), (fd,))
        os.close(fd)
    _, fds = await pair.channel.receive()
    seqpacket.close_all(fds)
    assert not pair.channel.is_calm, "whoever hands the socket over would hand over less than has come"
    pair.channel.close()
