"""The supervisor's side of the courier, against small programs that stand for one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from supervisor import courier_client as room
from supervisor.child import Child
from supervisor.courier_client import Courier
from supervisor.zygote_client import ForkError
from taskkit.lifecycle import ProcessState
from taskkit.wire.messages import Link, Message

pytestmark = pytest.mark.usefixtures("leaves_nothing")

PREAMBLE = """
import os, signal, socket, sys
from taskkit import seqpacket
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import *
control = socket.socket(fileno=int(sys.argv[1]))
def hear():
    received = seqpacket.receive(control)
    if received is None:
        sys.exit(0)
    return unpack(received[0], CourierOrder), received[1]
def say(message):
    seqpacket.send(control, pack(message))
"""

#: Greets each link with its pid; leaves when told to.
SERVES = """
say(CourierReady())
while True:
    order, fds = hear()
    if isinstance(order, Stop):
        sys.exit(3)
    os.write(fds[0], str(os.getpid()).encode())
    os.close(fds[0])
"""


class Post:
    """A Courier with a gateway that keeps what it gets."""

    def __init__(self) -> None:
        self.source = SERVES
        self.failures: list[Exception] = []
        self.made: list[int] = []
        self.gateway_is_up = True
        self.links: list[int] = []
        self._changed = trio.Event()
        self.courier = Courier(
            make=self._make, to_gateway=self._send, gateway_is_up=lambda: self.gateway_is_up
        )

    async def _make(self, control: int, faults: int) -> Child:
        await trio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        return self._spawn(control, faults)

    def _spawn(self, control: int, faults: int) -> Child:
        command = [sys.executable, "-c", PREAMBLE + self.source, str(control)]
        process = subprocess.Popen(command, pass_fds=[control, faults], process_group=0)
        process.returncode = 0  # the Child reaps it
        self.made.append(process.pid)
        self._wake()
        return Child("courier", process.pid, os.pidfd_open(process.pid), group=True)

    def _send(self, message: Message, fds: list[int]) -> None:
        assert isinstance(message, Link)
        self.links += [os.dup(fd) for fd in fds]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until what was made and linked fulfils a condition."""
        with trio.fail_after(20):
            while not condition():
                await self._changed.wait()

    async def link(self) -> int:
        """Return the pid that speaks on the oldest link; links are taken up in order."""
        await self.until(lambda: self.links)
        fd = self.links.pop(0)
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(fd)
        words = os.read(fd, 100)
        os.close(fd)
        return int(words)

    def close(self) -> None:
        for fd in self.links:
            os.close(fd)


@pytest.fixture
async def post(leaves_nothing: None) -> AsyncIterator[Post]:
    post = Post()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post.courier.run)
        yield post
        nursery.cancel_scope.cancel()
    post.close()


async def test_a_ready_courier_is_linked_to_the_gateway(post: Post) -> None:
    assert await post.link() == post.made[0]
    assert post.courier.child is not None
    assert post.courier.child.state is ProcessState.RUNNING


async def test_a_new_gateway_gets_a_link_of_its_own(post: Post) -> None:
    await post.link()
    post.courier.link()
    assert await post.link() == post.made[0]


async def test_nobody_is_linked_while_a_side_is_away(post: Post) -> None:
    await post.link()
    post.gateway_is_up = False
    post.courier.link()
    assert post.links == []
    post.gateway_is_up = True
    post.courier.link()
    assert await post.link() == post.made[0]


async def test_a_dead_courier_is_replaced_and_linked_again(post: Post) -> None:
    await post.link()
    os.kill(post.made[0], signal.SIGKILL)
    assert await post.link() == post.made[1]
    assert post.courier.last_exit == "SIGKILL"


@pytest.mark.parametrize(
    "source",
    [
        "say(CourierReady()); hear(); signal.pause()",
        "say(CourierReady()); control.send(b'?'); signal.pause()",
    ],
    ids=["silence", "garbage"],
)
async def test_silence_and_garbage_are_ended_and_replaced(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(room, "BEAT_SECONDS", 0.5)
    post = Post()
    post.source = source
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post.courier.run)
            await post.until(lambda: len(post.made) == 2)
            assert post.courier.last_exit == "SIGTERM"
            nursery.cancel_scope.cancel()
    post.close()


async def test_one_that_cannot_be_made_is_tried_again() -> None:
    post = Post()
    post.failures = [ForkError("the zygote is gone"), OSError(24, "too many open files")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post.courier.run)
        assert await post.link() == post.made[0]
        assert post.failures == []
        assert "too many" in post.courier.last_exit
        nursery.cancel_scope.cancel()
    post.close()


async def test_asked_to_stop_it_leaves_by_itself(post: Post) -> None:
    await post.link()
    with trio.fail_after(10):
        await post.courier.stop(5)
    assert post.courier.child is not None
    assert str(post.courier.child.exit) == "exit code 3"
    assert len(post.made) == 1


async def test_one_that_does_not_leave_is_ended() -> None:
    post = Post()
    post.source = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(CourierReady())\n"
        "os.write(hear()[1][0], str(os.getpid()).encode())\n"
        "while True: signal.pause()"
    )
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post.courier.run)
            await post.link()
            await post.courier.stop(0.1)
            assert post.courier.child is not None
            assert str(post.courier.child.exit) == "SIGKILL"
    post.close()


async def test_stopping_what_never_came_up_is_nothing() -> None:
    courier = Post().courier
    await courier.stop(1)
    assert courier.child is None
