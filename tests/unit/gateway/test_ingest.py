"""Looking into pipes without taking, taking exactly, finding the way back after a cut."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator

import pytest

from gateway.ingest import PEEK_SIZE, Poller, RunnerPipes, Scratch
from taskkit import linux, seqpacket
from taskkit.errors import CorruptFrame, FrameTooLarge
from taskkit.wire.codec import pack_runner_frame, unpack
from taskkit.wire.messages import Cancel, Event, Order
from tests.processes import open_descriptors
from tests.unit.gateway.gate import HandRunner


def _frame(seq: int, size: int = 10) -> bytes:
    return pack_runner_frame(Event(token="t", type="tick", data=b'"' + b"x" * size + b'"'), seq)


@pytest.fixture
def runner() -> Iterator[HandRunner]:
    made = HandRunner()
    yield made
    made.close()


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    made = Scratch()
    yield made
    made.close()


@pytest.fixture
def pipes(runner: HandRunner) -> Iterator[RunnerPipes]:
    made = _pipes(runner)
    yield made
    made.close()


def _pipes(runner: HandRunner, *, adopted: bool = False) -> RunnerPipes:
    fds = [os.dup(fd) for fd in runner._ends.near]
    return RunnerPipes(runner.spec, fds, adopted=adopted, lines_per_second=1_000)


def _waiting(pipes: RunnerPipes) -> int:
    return linux.bytes_to_read(pipes.events)


def test_looking_takes_nothing(runner: HandRunner, pipes: RunnerPipes, scratch: Scratch) -> None:
    runner.write(_frame(1) + _frame(2))
    before = _waiting(pipes)
    for _ in range(3):
        frames, size, error = pipes.peek(scratch, 0)
        assert ([frame.seq for frame in frames], size, error) == ([1, 2], before, None)
        assert _waiting(pipes) == before


def test_taking_takes_exactly(runner: HandRunner, pipes: RunnerPipes, scratch: Scratch) -> None:
    runner.write(_frame(1) + _frame(2) + _frame(3))
    pipes.consume(len(_frame(1)))
    assert [frame.seq for frame in pipes.peek(scratch, 1)[0]] == [2, 3]
    pipes.consume(0)
    assert [frame.seq for frame in pipes.peek(scratch, 1)[0]] == [2, 3]


def test_a_small_share_shows_less_but_never_nothing(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch
) -> None:
    small, large = _frame(1, 500), _frame(3, 20_000)
    runner.write(small + _frame(2, 500) + large)
    frames, size, error = pipes.peek(scratch, 0, len(small) + 10)
    assert ([frame.seq for frame in frames], size, error) == ([1], len(small), None)
    pipes.consume(size)
    pipes.consume(pipes.peek(scratch, 1, 1_000)[1])
    frames, size, _ = pipes.peek(scratch, 2, 1_000)
    assert ([frame.seq for frame in frames], size) == ([3], len(large)), "it is longer than its share"


def test_an_empty_pipe_shows_nothing(pipes: RunnerPipes, scratch: Scratch) -> None:
    assert pipes.peek(scratch, 0) == ([], 0, None)


def test_half_a_frame_waits_for_its_rest(runner: HandRunner, pipes: RunnerPipes, scratch: Scratch) -> None:
    whole = _frame(1, 500)
    for cut in (1, 2, 19, 20, 21, len(whole) - 1):
        runner.write(whole[:cut])
        assert pipes.peek(scratch, 0) == ([], 0, None)
        runner.write(whole[cut:])
        frames, size, _ = pipes.peek(scratch, 0)
        assert (len(frames), size) == (1, len(whole))
        pipes.consume(size)


def test_one_round_looks_at_a_bounded_share(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch, rng: random.Random
) -> None:
    """However much a runner floods, a round takes 64 KiB of it; nothing is lost on the way."""
    frames = [_frame(seq, rng.randint(0, 20_000)) for seq in range(1, 200)]
    written, seen = 0, 0
    while seen < len(frames):
        while written < len(frames) and _waiting(pipes) + len(frames[written]) < runner.spec.pipe_size // 2:
            runner.write(frames[written])
            written += 1
        found, size, error = pipes.peek(scratch, seen)
        assert error is None
        assert 0 < size <= PEEK_SIZE
        assert [frame.seq for frame in found] == list(range(seen + 1, seen + 1 + len(found)))
        pipes.consume(size)
        seen += len(found)


def test_what_precedes_garbage_is_shown_with_the_error(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch
) -> None:
    runner.write(_frame(1) + _frame(2) + b"garbage")
    frames, size, error = pipes.peek(scratch, 0)
    assert [frame.seq for frame in frames] == [1, 2]
    assert size == len(_frame(1)) * 2
    assert isinstance(error, CorruptFrame)


def test_a_frame_that_announces_too_much_is_refused_at_once(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch
) -> None:
    runner.write(_frame(1)[:4] + (10**9).to_bytes(4, "big") + bytes(12))
    assert isinstance(pipes.peek(scratch, 0)[2], FrameTooLarge)


def test_another_reader_is_noticed(runner: HandRunner, pipes: RunnerPipes, scratch: Scratch) -> None:
    runner.write(_frame(1))
    size = pipes.peek(scratch, 0)[1]
    os.read(runner._ends.near[0], 5)
    with pytest.raises(RuntimeError, match="somebody else reads it"):
        pipes.consume(size)


def test_an_adopted_pipe_that_begins_inside_a_frame_finds_the_next_one(
    runner: HandRunner, scratch: Scratch
) -> None:
    """What a gateway leaves behind that was killed inside its consuming read."""
    first = _frame(1, 300)
    for cut in (1, 19, 20, 21, 100, len(first) - 1):
        pipes = _pipes(runner, adopted=True)
        runner.write(first[cut:] + _frame(2) + _frame(3))
        frames, size, error = pipes.peek(scratch, 1)
        assert ([frame.seq for frame in frames], error) == ([2, 3], None)
        assert size == _waiting(pipes), "the rest of the first frame is consumed along with the others"
        pipes.consume(size)
        assert _waiting(pipes) == 0
        pipes.close()


def test_an_adopted_pipe_waits_for_a_sound_frame_behind_half_of_one(
    runner: HandRunner, scratch: Scratch
) -> None:
    """The next frame may come later than the next gateway: half a frame alone is no reason to kill the runner."""
    pipes = _pipes(runner, adopted=True)
    runner.write(_frame(1, 300)[100:])
    assert pipes.peek(scratch, 1) == ([], 0, None)
    assert pipes.peek(scratch, 1) == ([], 0, None)
    runner.write(_frame(2))
    frames, size, error = pipes.peek(scratch, 1)
    assert ([frame.seq for frame in frames], size, error) == ([2], _waiting(pipes), None)
    pipes.close()


def test_the_rest_of_the_largest_frame_does_not_hide_the_largest_next_one(
    runner: HandRunner, scratch: Scratch
) -> None:
    pipes = _pipes(runner, adopted=True)
    runner.write(_frame(1, 61_000)[1:] + _frame(2, 61_000))
    frames, size, error = pipes.peek(scratch, 1)
    assert ([frame.seq for frame in frames], size, error) == ([2], _waiting(pipes), None)
    pipes.consume(size)
    assert _waiting(pipes) == 0
    pipes.close()


def test_an_adopted_pipe_whose_garbage_fills_a_look_is_corrupt(runner: HandRunner, scratch: Scratch) -> None:
    pipes = _pipes(runner, adopted=True)
    runner.write(b"g" * 2 * PEEK_SIZE)
    assert isinstance(pipes.peek(scratch, 1)[2], CorruptFrame)
    pipes.close()


def test_a_whole_adopted_pipe_is_read_from_its_start(runner: HandRunner, scratch: Scratch) -> None:
    pipes = _pipes(runner, adopted=True)
    runner.write(_frame(4) + _frame(5) + _frame(6)[:30])
    frames, size, error = pipes.peek(scratch, 5)
    assert ([frame.seq for frame in frames], size, error) == ([4, 5], len(_frame(4)) * 2, None)
    pipes.close()


def test_after_its_first_frames_an_adopted_pipe_is_like_any_other(
    runner: HandRunner, scratch: Scratch
) -> None:
    pipes = _pipes(runner, adopted=True)
    runner.write(_frame(1))
    pipes.consume(pipes.peek(scratch, 0)[1])
    runner.write(b"garbage that is long enough" + _frame(2))
    assert isinstance(pipes.peek(scratch, 1)[2], CorruptFrame)
    pipes.close()


def test_the_scratch_pipe_is_empty_after_an_error(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.write(_frame(1))
    read = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        pipes.peek(scratch, 0)
    monkeypatch.setattr(os, "read", read)
    assert [frame.seq for frame in pipes.peek(scratch, 0)[0]] == [1], "and not the same twice"


def test_output_is_taken_without_waiting(runner: HandRunner, pipes: RunnerPipes) -> None:
    assert pipes.read_output() == b""
    runner.print("hello\n")
    assert pipes.read_output() == b"hello\n"
    assert pipes.read_output() == b""


def test_the_end_is_an_empty_pipe_without_writers(
    runner: HandRunner, pipes: RunnerPipes, scratch: Scratch
) -> None:
    assert not pipes.at_end()
    runner.write(_frame(1))
    runner.die(None)
    assert not pipes.at_end()
    pipes.consume(pipes.peek(scratch, 0)[1])
    assert pipes.at_end()


def test_orders_reach_the_runner_until_it_is_gone(runner: HandRunner, pipes: RunnerPipes) -> None:
    assert pipes.order(Cancel(token="t"))
    assert runner.orders() == [Cancel(token="t")]
    runner.die(None)
    assert not pipes.order(Cancel(token="t"))


def test_a_runner_that_does_not_read_its_orders_does_not_stop_the_gateway(
    runner: HandRunner, pipes: RunnerPipes
) -> None:
    taken = sum(pipes.order(Cancel(token="t" * 1000)) for _ in range(1000))
    assert 0 < taken < 1000
    assert len(runner.orders()) == taken


def test_an_order_of_any_size_arrives(runner: HandRunner, pipes: RunnerPipes) -> None:
    before = open_descriptors()
    order = Cancel(token="t" * 300_000)
    assert pipes.order(order)
    received = seqpacket.receive(runner._orders)
    assert received is not None
    message: object = unpack(received[0], Order)
    assert message == order
    assert open_descriptors() == before


def test_the_poller_tells_what_is_readable_and_rests(runner: HandRunner, pipes: RunnerPipes) -> None:
    poller = Poller()
    try:
        poller.watch(pipes.events)
        poller.watch(pipes.events)
        assert poller.ready() == set()
        runner.write(b"x")
        assert poller.ready() == {pipes.events}
        poller.rest(pipes.events)
        poller.rest(pipes.events)
        assert poller.ready() == set()
        poller.watch(pipes.events)
        assert poller.ready() == {pipes.events}
    finally:
        poller.close()


def test_a_bell_ends_the_wait_once_however_often_it_was_rung() -> None:
    poller = Poller()
    watch = select.poll()
    watch.register(poller.fileno(), select.POLLIN)
    assert watch.poll(0) == []
    poller.ring()
    poller.ring()
    assert watch.poll(0)
    assert poller.ready() == set(), "it is no pipe"
    assert watch.poll(0) == []
    poller.ring()
    assert watch.poll(0)
    poller.close()
    poller.ring()  # whoever comes late does no harm
