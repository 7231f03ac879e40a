"""What arrives on the orders socket, with and without an event loop, and how it interrupts a task."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from taskkit import linux, seqpacket
from taskkit.errors import RunCancelled, SoftTimeout
from taskkit.runner.emitter import Emitter
from taskkit.runner.orders import Orders
from taskkit.wire.codec import pack
from taskkit.wire.framing import read_frames
from taskkit.wire.messages import Cancel, Create, Input, Order, Retire, Start, Started, Submit, TakeBack


class Desk:
    """Both ends of an orders socket."""

    def __init__(self) -> None:
        self.near, far = linux.seqpacket_pair()
        self.far = far
        self.given_back: list[str] = []
        self.orders = Orders(far, self.given_back.append)

    def give(self, *orders: Order) -> None:
        for order in orders:
            seqpacket.send(self.near, pack(order))


@pytest.fixture
def desk() -> Iterator[Desk]:
    before = signal.getsignal(signal.SIGIO)
    made = Desk()
    yield made
    made.near.close()
    made.far.close()
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    read, write = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    yield Emitter(write, 65536, directory)
    for fd in (read, write, directory):
        os.close(fd)


def _start(token: str) -> Start:
    return Start(run="r", attempt=1, token=token, task="t.f")


def test_orders_come_in_their_order(desk: Desk) -> None:
    create = Create(ask="a", task="t", fields={}, submission=Submit(id="s", task="t"))
    desk.give(_start("one"), create, _start("two"))
    assert [desk.orders.next() for _ in range(3)] == [_start("one"), create, _start("two")]
    assert desk.orders.next_nowait() is None


def test_a_start_counts_once_however_often_it_comes(desk: Desk) -> None:
    desk.give(_start("one"), _start("one"))
    assert desk.orders.next() == _start("one")
    desk.give(_start("one"), _start("two"))
    assert desk.orders.next() == _start("two")
    assert desk.orders.next_nowait() is None


def test_a_cancellation_is_remembered_whenever_it_comes(desk: Desk) -> None:
    desk.give(Cancel(token="one"), _start("one"))
    assert not desk.orders.is_cancelled("one"), "nothing has been received yet"
    desk.orders.next()
    assert desk.orders.is_cancelled("one")
    assert not desk.orders.is_cancelled("two")


def test_what_came_before_retire_is_done_before_leaving(desk: Desk) -> None:
    desk.give(_start("one"), Retire())
    assert desk.orders.next() == _start("one")
    assert desk.orders.next() is None
    assert desk.orders.retired


def test_nobody_left_to_give_orders_is_the_end(desk: Desk) -> None:
    desk.give(_start("one"))
    desk.near.close()
    assert desk.orders.next() == _start("one")
    assert desk.orders.next() is None
    assert desk.orders.closed


@pytest.mark.parametrize("packet", [b"\x02what", b"\x01no memfd", b"x" * 70_000])
def test_a_packet_that_is_no_message_closes_the_socket(desk: Desk, packet: bytes) -> None:
    desk.near.send(packet)
    assert desk.orders.next() is None
    assert desk.orders.closed


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", b"\x81\xa7message\xa5Later"])
def test_a_message_that_is_not_for_us_is_passed_over(desk: Desk, payload: bytes) -> None:
    seqpacket.send(desk.near, payload)
    desk.give(_start("one"))
    assert desk.orders.next() == _start("one")


def test_descriptors_that_come_along_are_closed(desk: Desk) -> None:
    read, write = os.pipe()
    seqpacket.send(desk.near, pack(_start("one")), (write,))
    os.close(write)
    assert desk.orders.next() == _start("one")
    assert os.read(read, 1) == b"", "no other write end is left"
    os.close(read)


def test_waiting_blocks_until_something_comes(desk: Desk) -> None:
    timer = threading.Timer(0.05, desk.give, [_start("one")])
    timer.start()
    assert desk.orders.next() == _start("one")
    timer.join()


async def test_waiting_in_a_loop_ends_when_something_comes(desk: Desk) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.orders.wait)
            await trio.testing.wait_all_tasks_blocked()
            desk.give(Cancel(token="one"))
    assert desk.orders.is_cancelled("one")


def test_a_cancellation_interrupts_a_blocking_call(desk: Desk, emitter: Emitter) -> None:
    timer = threading.Timer(0.2, desk.give, [Cancel(token="one")])
    started = time.monotonic()
    timer.start()
    with pytest.raises(RunCancelled), desk.orders.interrupting("one", emitter):
        time.sleep(30)
    assert time.monotonic() - started < 20
    timer.join()


def test_a_cancellation_that_is_there_already_interrupts_at_once(desk: Desk, emitter: Emitter) -> None:
    desk.give(Cancel(token="one"))
    with pytest.raises(RunCancelled), desk.orders.interrupting("one", emitter):
        time.sleep(30)


def test_other_orders_do_not_interrupt(desk: Desk, emitter: Emitter) -> None:
    with desk.orders.interrupting("one", emitter):
        desk.give(_start("two"), Cancel(token="two"), Retire())
        time.sleep(0.01)
    assert desk.orders.next() == _start("two")
    assert desk.orders.is_cancelled("two")
    assert desk.orders.retired


def test_a_cancellation_interrupts_once(desk: Desk, emitter: Emitter) -> None:
    with desk.orders.interrupting("one", emitter):
        try:
            desk.give(Cancel(token="one"))
            time.sleep(30)
        except RunCancelled:
            desk.give(Cancel(token="one"), Cancel(token="one"))
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGIO) is signal.SIG_IGN


def test_afterwards_nothing_interrupts(desk: Desk, emitter: Emitter) -> None:
    with desk.orders.interrupting("one", emitter):
        pass
    desk.give(Cancel(token="one"))
    time.sleep(0.01)
    assert desk.orders.next_nowait() is None


def test_frames_stay_whole_when_cancellations_arrive_in_the_middle(
    tmp_path: Path, rng: random.Random
) -> None:
    """Real SIGIO from the kernel, a reader that lets the pipe fill, a thousand attempts."""
    read, write = os.pipe()
    size = linux.set_pipe_size(write, 65536)
    directory = os.open(tmp_path, os.O_RDONLY)
    emitter = Emitter(write, size, directory)
    data = bytearray()

    def drain() -> None:
        while part := os.read(read, 30_000):
            data.extend(part)

    reader = threading.Thread(target=drain, daemon=True)  # a failure must not keep pytest from leaving
    reader.start()
    before = signal.getsignal(signal.SIGIO)
    interrupted = 0
    near, far = linux.seqpacket_pair()
    with near, far:
        orders = Orders(far, lambda token: None)
        for number in range(1_000):
            token = f"t{number}"
            canceller = threading.Timer(
                rng.random() / 3000, seqpacket.send, (near, pack(Cancel(token=token)))
            )
            canceller.start()  # outside: an exception in the middle of threading's own code would be this test's fault
            with contextlib.suppress(RunCancelled), orders.interrupting(token, emitter):
                while True:
                    try:
                        emitter.send(Started(token="x" * rng.choice((10, 3_000, 9_000))))
                    except RunCancelled:
                        interrupted += 1
                        emitter.send(Started(token="cleaning up"))
                        raise
            canceller.join()
    os.close(write)
    reader.join(20)
    signal.signal(signal.SIGIO, before)
    frames = list(read_frames(bytes(data), 65536 // 4))
    assert sum(frame.size for frame in frames) == len(data)
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    assert sum(b"cleaning up" in frame.body for frame in frames) == interrupted
    assert interrupted > 0
    os.close(read)
    os.close(directory)


def test_the_socket_is_made_not_to_block() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        Orders(far, lambda token: None)
        assert not far.getblocking()


def _start(token: str) -> Start:
    return Start(run="r", attempt=1, token=token, task="proj.echo")


def test_what_has_not_begun_is_given_back_and_nothing_else(desk: Desk) -> None:
    desk.give(_start("a"), _start("b"), _start("c"))
    begun = desk.orders.next_nowait()
    assert isinstance(begun, Start)
    assert begun.token == "a"
    desk.give(TakeBack(tokens=["a", "c", "unknown"]))
    order = desk.orders.next_nowait()
    assert isinstance(order, Start)
    assert order.token == "b"
    assert desk.given_back == ["c"]
    desk.give(_start("c"))  # a new gateway repeats what the old one had ordered
    assert desk.orders.next_nowait() is None


def test_it_is_given_back_while_a_task_works(desk: Desk) -> None:
    desk.give(_start("b"))
    read, write = os.pipe()
    directory = os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY)
    emitter = Emitter(write, 65536, directory)
    with desk.orders.interrupting("a", emitter):
        desk.give(TakeBack(tokens=["b"]))
        deadline = time.monotonic() + 10
        while not desk.given_back and time.monotonic() < deadline:
            time.sleep(0.001)  # as a task that is busy in Python
    for fd in (read, write, directory):
        os.close(fd)
    assert desk.given_back == ["b"]
    assert desk.orders.next_nowait() is None


def test_at_a_soft_timeout_a_task_may_go_on_and_can_be_cancelled_still(desk: Desk, emitter: Emitter) -> None:
    desk.give(_start("one"))
    desk.orders.next()
    mail = desk.orders.mail("one")
    with desk.orders.interrupting("one", emitter):
        assert not mail.cancelled
        assert _interruption(desk, "soft_timeout") is SoftTimeout
        assert mail.cancelled
        assert _interruption(desk, "cancelled") is RunCancelled


def _interruption(desk: Desk, reason: str) -> type[BaseException] | None:
    """Return what is raised when the gateway says it twice, as one that takes over does."""
    caught = None
    try:
        desk.give(Cancel(token="one", reason=reason))
        time.sleep(30)
    except (RunCancelled, SoftTimeout) as raised:
        caught = type(raised)
    desk.give(Cancel(token="one", reason=reason))
    time.sleep(0.01)
    return caught


def test_what_was_cancelled_before_it_was_ordered_knows_it(desk: Desk) -> None:
    desk.give(Cancel(token="one"), _start("one"))
    desk.orders.next()
    assert desk.orders.mail("one").cancelled


def _meanwhile(monkeypatch: pytest.MonkeyPatch, desk: Desk, *orders: Order) -> None:
    """Have `orders` come, with their signal, when one was received and is not sorted yet."""
    waiting = list(orders)
    receive = seqpacket.receive

    def received(sock: socket.socket) -> tuple[bytes, list[int]] | None:
        found = receive(sock)
        if waiting:
            desk.give(waiting.pop(0))
            signal.raise_signal(signal.SIGIO)
        return found

    monkeypatch.setattr(seqpacket, "receive", received)


def test_what_comes_in_the_middle_of_a_look_is_heard_behind_what_is_in_hand(
    desk: Desk, emitter: Emitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.give(_start("one"))
    desk.orders.next()
    inbox = desk.orders.mail("one").inbox("answer")
    first, *others = (Input(token="one", number=n, name="answer", data=b'{"n":%d}' % n) for n in (1, 2, 3))
    with desk.orders.interrupting("one", emitter):
        _meanwhile(monkeypatch, desk, *others)
        desk.give(first)
        assert [inbox.get(10)["n"] for _ in range(3)] == [1, 2, 3]


def test_a_cancellation_in_the_middle_of_a_look_loses_no_order(
    desk: Desk, emitter: Emitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(RunCancelled), desk.orders.interrupting("one", emitter):
        _meanwhile(monkeypatch, desk, Cancel(token="one"), _start("three"))
        desk.give(_start("two"))
        time.sleep(30)
    assert desk.orders.is_cancelled("one")
    assert [desk.orders.next_nowait(), desk.orders.next_nowait()] == [_start("two"), _start("three")]


def test_a_thread_that_waits_has_the_main_thread_look_again(desk: Desk, emitter: Emitter) -> None:
    desk.give(_start("one"))
    desk.orders.next()
    inbox = desk.orders.mail("one").inbox("answer")
    with desk.orders.interrupting("one", emitter):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})  # as one that came and woke nobody
        desk.give(Input(token="one", number=1, name="answer", data=b'{"n":1}'))
        while signal.SIGIO not in signal.sigpending():
            time.sleep(0.001)
        assert signal.sigtimedwait({signal.SIGIO}, 10) is not None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
        assert inbox.get(10) == {"n": 1}
