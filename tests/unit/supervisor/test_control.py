"""The operator socket, asked over a real one."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from supervisor import control, listener
from supervisor.control import OperatorSocket
from taskkit import linux, seqpacket
from taskkit.channel import Channel
from taskkit.wire.messages import ChildStatus, Operation, Status

pytestmark = pytest.mark.usefixtures("leaves_nothing")

Deadline = Callable[[float], AbstractContextManager[trio.CancelScope]]


class Tree:
    """Answers as a tree does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Operation] = []

    async def operate(self, operation: Operation) -> Status:
        self.asked.append(operation)
        child = ChildStatus(name="gateway", kind="gateway", state="RUNNING", pid=7)
        return Status(
            pid=os.getpid(),
            state=f"after {len(self.asked)}",
            url="http://127.0.0.1:1",
            state_dir="/state",
            settings_module="project.settings",
            uptime=1.5,
            children=[child],
        )


@pytest.fixture
def tree() -> Tree:
    return Tree()


@pytest.fixture
async def path(leaves_nothing: None, tree: Tree, tmp_path: Path) -> AsyncIterator[Path]:
    """Give the path of a served operator socket."""
    path = tmp_path / "control.sock"
    with listener.listen_seqpacket(path) as sock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(OperatorSocket(sock, os.getuid(), tree.operate).run)
            yield path
            nursery.cancel_scope.cancel()


def connect(path: Path) -> Channel[Status]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(path))
    return Channel(sock, Status)


async def ask(channel: Channel[Status], name: str, *, now: bool = False) -> Status:
    channel.send(Operation(name=name, now=now))
    status, fds = await channel.receive()
    assert fds == []
    return status


async def test_status_comes_whole(path: Path, tree: Tree, deadline: Deadline) -> None:
    channel = connect(path)
    with deadline(5):
        status = await ask(channel, "status")
    channel.close()
    assert msgspec.structs.replace(status, state="after 2") == await tree.operate(Operation(name="status"))
    assert status.state == "after 1"


async def test_one_connection_may_ask_again(path: Path, tree: Tree, deadline: Deadline) -> None:
    channel = connect(path)
    with deadline(5):
        assert (await ask(channel, "status")).state == "after 1"
        assert (await ask(channel, "stop", now=True)).state == "after 2"
    channel.close()
    assert tree.asked == [Operation(name="status"), Operation(name="stop", now=True)]


async def test_operators_do_not_wait_for_each_other(path: Path, deadline: Deadline) -> None:
    silent, first, second = connect(path), connect(path), connect(path)
    with deadline(5):
        assert (await ask(second, "status")).state == "after 1"
        assert (await ask(first, "status")).state == "after 2"
    for channel in (silent, first, second):
        channel.close()


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00", b"\x00\xc1", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x80", b"\x01"]
)
async def test_garbage_ends_its_connection_and_no_other(
    path: Path, tree: Tree, deadline: Deadline, garbage: bytes
) -> None:
    other = connect(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as foreign:
        foreign.connect(str(path))
        foreign.send(garbage)
        foreign.setblocking(False)
        with deadline(5):
            await trio.lowlevel.wait_readable(foreign)
            assert foreign.recv(100) == b"", "the supervisor hung up"
            assert (await ask(other, "status")).state == "after 1"
    other.close()


async def test_descriptors_that_come_along_are_closed(path: Path, deadline: Deadline) -> None:
    reader, writer = os.pipe()
    channel = connect(path)
    channel.send(Operation(name="status"), [writer])
    os.close(writer)
    with deadline(5):
        await channel.receive()
        await trio.lowlevel.wait_readable(reader)
    assert os.read(reader, 1) == b"", "nobody holds the other end"
    os.close(reader)
    channel.close()


async def test_a_client_that_hangs_up_at_once_harms_nobody(path: Path, deadline: Deadline) -> None:
    for _ in range(10):  # fewer than may wait to be accepted: nothing accepts while this test connects
        connect(path).close()
    channel = connect(path)
    with deadline(5):
        await ask(channel, "status")
    channel.close()


async def test_one_that_asks_nothing_is_let_go(
    path: Path, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_PATIENCE", 0.05)
    channel = connect(path)
    with deadline(5), pytest.raises(trio.EndOfChannel):
        await channel.receive()
    channel.close()


async def test_another_user_is_refused(tmp_path: Path, tree: Tree, deadline: Deadline) -> None:
    own = os.getuid()

    def pretend(sock: socket.socket) -> int:
        return own + 1000

    path = tmp_path / "other.sock"
    with listener.listen_seqpacket(path) as sock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "_peer_uid", pretend)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(OperatorSocket(sock, own, tree.operate).run)
            channel = connect(path)
            channel.send(Operation(name="stop"))
            with deadline(5), pytest.raises(trio.EndOfChannel):
                await channel.receive()
            channel.close()
            nursery.cancel_scope.cancel()
    assert tree.asked == []


def test_the_peers_user_is_what_the_kernel_says() -> None:
    one, other = linux.seqpacket_pair()
    with one, other:
        seqpacket.send(one, b"x")
        assert control._peer_uid(other) == os.getuid()
