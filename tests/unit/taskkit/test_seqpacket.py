"""Messages with descriptors over a real SEQPACKET socket."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from taskkit import linux, seqpacket
from taskkit.errors import FrameTooLarge, LocalWireError, RemoteWireError
from taskkit.seqpacket import INLINE_LIMIT, MAX_DESCRIPTORS, MESSAGE_LIMIT

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Give two connected sockets; fail when the test leaks a descriptor."""
    before = set(os.listdir("/proc/self/fd"))
    left, right = linux.seqpacket_pair()
    with left, right:
        for end in (left, right):
            end.settimeout(5)
        yield left, right
    assert set(os.listdir("/proc/self/fd")) == before


def send_raw(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
    """Send what a peer that does not know the protocol may send."""
    sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


def fill(sock: socket.socket) -> None:
    """Send more than any socket buffer holds."""
    for _ in range(1000):
        seqpacket.send(sock, bytes(60_000))


def received(sock: socket.socket) -> tuple[bytes, list[int]]:
    found = seqpacket.receive(sock)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0, 1, 1000, INLINE_LIMIT - 1, INLINE_LIMIT, INLINE_LIMIT + 1, 3_000_000])
def test_a_message_of_any_size_comes_whole(pair: Pair, size: int) -> None:
    payload = os.urandom(size)
    seqpacket.send(pair[0], payload)
    assert received(pair[1]) == (payload, [])


def test_boundaries_are_kept(pair: Pair) -> None:
    payloads = [b"one", b"", b"three" * 100]
    for payload in payloads:
        seqpacket.send(pair[0], payload)
    assert [received(pair[1])[0] for _ in payloads] == payloads


@pytest.mark.parametrize("size", [10, INLINE_LIMIT + 10], ids=["inline", "memfd"])
def test_descriptors_come_along_in_their_order(pair: Pair, size: int) -> None:
    reader, writer = os.pipe()
    seqpacket.send(pair[0], bytes(size), (reader, writer))
    os.close(reader)
    os.close(writer)
    payload, fds = received(pair[1])
    assert len(payload) == size
    os.write(fds[1], b"through the copies")
    assert os.read(fds[0], 100) == b"through the copies"
    seqpacket.close_all(fds)
    assert fds == []


def test_received_descriptors_do_not_leak_into_programs(pair: Pair) -> None:
    fd = linux.sealed_memfd("test", b"x")
    seqpacket.send(pair[0], b"", (fd,))
    os.close(fd)
    _, fds = received(pair[1])
    assert fcntl.fcntl(fds[0], fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    seqpacket.close_all(fds)


def test_many_descriptors_at_once(pair: Pair) -> None:
    fd = linux.sealed_memfd("test", b"x")
    seqpacket.send(pair[0], b"many", (fd,) * MAX_DESCRIPTORS)
    os.close(fd)
    _, fds = received(pair[1])
    assert len(fds) == MAX_DESCRIPTORS
    seqpacket.close_all(fds)


def test_end_of_file_is_none(pair: Pair) -> None:
    seqpacket.send(pair[0], b"last")
    pair[0].close()
    assert received(pair[1])[0] == b"last"
    assert seqpacket.receive(pair[1]) is None


def test_sending_to_nobody_raises_and_no_signal_kills(pair: Pair) -> None:
    pair[1].close()
    for payload in (b"x", bytes(INLINE_LIMIT + 1)):
        with pytest.raises(BrokenPipeError):
            seqpacket.send(pair[0], payload)


def test_a_socket_that_does_not_block_says_so(pair: Pair) -> None:
    for end in pair:
        end.setblocking(False)
    with pytest.raises(BlockingIOError):
        seqpacket.receive(pair[1])
    with pytest.raises(BlockingIOError):
        fill(pair[0])


def test_a_packet_above_the_limit_is_refused(pair: Pair) -> None:
    send_raw(pair[0], bytes(INLINE_LIMIT + 2), [])
    with pytest.raises(RemoteWireError, match="cut"):
        seqpacket.receive(pair[1])


def test_a_refused_packet_leaves_none_of_its_descriptors(pair: Pair) -> None:
    reader, writer = os.pipe()
    for packet in (b"?garbage", bytes(INLINE_LIMIT + 2), b"\x01extra"):
        send_raw(pair[0], packet, [reader, writer])
        with pytest.raises(RemoteWireError):
            seqpacket.receive(pair[1])
    os.close(reader)
    os.close(writer)


def test_an_announced_memfd_that_is_missing_is_refused(pair: Pair) -> None:
    send_raw(pair[0], b"\x01", [])
    with pytest.raises(RemoteWireError):
        seqpacket.receive(pair[1])


def test_an_announced_memfd_that_is_a_pipe_is_refused(pair: Pair) -> None:
    reader, writer = os.pipe()
    send_raw(pair[0], b"\x01", [reader, writer])
    os.close(reader)
    os.close(writer)
    with pytest.raises(RemoteWireError):
        seqpacket.receive(pair[1])


def test_an_empty_packet_with_a_descriptor_does_not_leak_it(pair: Pair) -> None:
    fd = linux.sealed_memfd("test", b"x")
    send_raw(pair[0], b"", [fd])
    os.close(fd)
    with pytest.raises(RemoteWireError):
        seqpacket.receive(pair[1])


def test_a_huge_memfd_is_refused_on_its_size(pair: Pair) -> None:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, MESSAGE_LIMIT + 1)
    send_raw(pair[0], b"\x01", [fd, fd])
    os.close(fd)
    with pytest.raises(FrameTooLarge):
        seqpacket.receive(pair[1])


def test_a_message_above_the_limit_is_ours_to_avoid(pair: Pair) -> None:
    with pytest.raises(LocalWireError):
        seqpacket.send(pair[0], bytes(MESSAGE_LIMIT + 1))
