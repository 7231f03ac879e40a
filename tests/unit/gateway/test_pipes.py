"""All runners' pipes at once: fair, contained, never a busy loop."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio

from gateway.book import Book
from gateway.pipes import Pipes
from gateway.store.rows import Batch, Opened
from taskkit.wire.messages import Cancel, Cause, Event, Finished, Kill, RunnerSpec, Start, Started
from tests.unit.gateway.gate import SETTINGS, HandRunner, submission


@dataclass
class Desk:
    """A book, its pipes, and rounds made by hand."""

    book: Book = field(default_factory=lambda: Book(SETTINGS, Opened({}, [], {}, 1, 1), [], 0.0))
    runners: list[HandRunner] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipes = Pipes(self.book, lines_per_second=1_000)

    def runner(self, id: str, **spec: object) -> HandRunner:
        """Bring a runner up that has said hello and got a run."""
        runner = HandRunner(id, **spec)
        self.runners.append(runner)
        self.pipes.add(runner.spec, [os.dup(fd) for fd in runner._ends.near], adopted=False)
        self.book.runner_up(runner.spec, 1, 0.0, adopted=False)
        runner.hello()
        self.book.accept(submission(), 0.0)
        self.round()
        return runner

    def round(self) -> Batch:
        """Look, claim, commit, consume, send orders; return the batch."""
        taken = self.pipes.look()
        self.book.claim(1.0)
        batch, after = self.book.take()
        for id, size in taken:
            self.pipes.consume(id, size)
        for id, order in after.orders:
            self.pipes.order(id, order)
        for id in after.drained:
            self.pipes.drop(id)
        self.control = after.control
        return batch

    def start(self, runner: HandRunner) -> str:
        """Have the runner begin its newest run."""
        token = [order.token for order in runner.orders() if isinstance(order, Start)][-1]
        runner.say(Started(token=token))
        self.round()
        return token


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    yield made
    made.pipes.close()
    for runner in made.runners:
        runner.close()


def _ticks(batch: Batch) -> list[bytes]:
    return [event.data for event in batch.events if event.type == "tick"]


async def test_every_runner_gets_its_share_of_a_round(desk: Desk) -> None:
    loud, quiet = desk.runner("loud"), desk.runner("quiet")
    tokens = {runner: desk.start(runner) for runner in (loud, quiet)}
    loud.say(*(Event(token=tokens[loud], type="flood", data=b'"' + b"x" * 2_000 + b'"') for _ in range(100)))
    quiet.tick(tokens[quiet], 1)
    batch = desk.round()
    assert _ticks(batch) == [b'{"n":1}']
    assert sum(event.type == "flood" for event in batch.events) < 40
    total = sum(event.type == "flood" for event in batch.events)
    for _ in range(20):
        total += sum(event.type == "flood" for event in desk.round().events)
    assert total == 100


async def test_rounds_are_short_while_somebody_says_little(
    desk: Desk, autojump_clock: trio.testing.MockClock
) -> None:
    loud, quiet = desk.runner("loud"), desk.runner("quiet")
    tokens = {runner: desk.start(runner) for runner in (loud, quiet)}
    await trio.sleep(1.0)  # what was said at their beginning was little, too
    flood = [Event(token=tokens[loud], type="flood", data=b'"' + b"x" * 500 + b'"')] * 400

    def taken() -> int:
        return sum(event.type == "flood" for event in desk.round().events)

    loud.say(*flood)
    alone = taken()
    quiet.tick(tokens[quiet], 1)
    taken()
    beside = taken()
    assert alone > 100
    assert 10 < beside < alone / 3
    await trio.sleep(0.2)
    assert taken() > beside, "nobody says anything any more"


async def test_half_a_frame_rests_longer_and_longer_and_goes_on(
    desk: Desk, autojump_clock: trio.testing.MockClock
) -> None:
    runner = desk.runner("r1")
    token = desk.start(runner)
    frame = runner.frame(Event(token=token, type="tick", data=b"1"))
    runner.write(frame[:10])
    pauses = []
    for _ in range(6):
        assert not desk.round().events
        look = desk.pipes.next_look()
        assert look is not None
        pauses.append(round(look - trio.current_time(), 3))
        assert desk.pipes.look() == [], "it is not looked at while it rests"
        desk.book.take()
        await trio.sleep(look - trio.current_time() + 0.0001)
    assert pauses == [0.005, 0.01, 0.02, 0.04, 0.05, 0.05]
    runner.write(frame[10:])
    assert _ticks(desk.round()) == [b"1"]
    assert desk.pipes.next_look() is None


async def test_a_resting_runner_does_not_delay_its_neighbour(desk: Desk) -> None:
    half, whole = desk.runner("half"), desk.runner("whole")
    desk.start(half)
    token = desk.start(whole)
    half.write(b"BH")
    desk.round()
    whole.tick(token, 1)
    assert _ticks(desk.round()) == [b'{"n":1}']


async def test_garbage_ends_that_runner_keeps_what_preceded_and_harms_nobody(desk: Desk) -> None:
    bad, good = desk.runner("bad"), desk.runner("good")
    tokens = {runner: desk.start(runner) for runner in (bad, good)}
    bad.tick(tokens[bad], 1)
    bad.write(b"\0garbage, long enough for a header")
    bad.tick(tokens[bad], 2)
    good.tick(tokens[good], 3)
    batch = desk.round()
    assert sorted(_ticks(batch)) == [b'{"n":1}', b'{"n":3}']
    (kill,) = [message for message in desk.control if isinstance(message, Kill)]
    assert (kill.runner, kill.kind) == ("bad", "corrupt")
    good.tick(tokens[good], 4)
    bad.tick(tokens[bad], 5)
    assert _ticks(desk.round()) == [b'{"n":4}']
    bad.die(None)
    desk.book.runner_exited("bad", Cause(kind="signal", signal="SIGKILL"))
    ends = [event for event in desk.round().events if event.type == "stream.end"]
    assert len(ends) == 1
    assert b'"corrupt"' in ends[0].data


@pytest.mark.parametrize(
    "message", [Event(token="t", type="x", data=b"1"), Started(token="t"), Finished(token="t", ending="x")]
)
async def test_a_message_out_of_its_turn_is_corrupt_as_well(
    desk: Desk, message: Event | Started | Finished
) -> None:
    runner = HandRunner("r1")
    desk.runners.append(runner)
    desk.pipes.add(runner.spec, [os.dup(fd) for fd in runner._ends.near], adopted=False)
    desk.book.runner_up(runner.spec, 1, 0.0, adopted=False)
    runner.say(message)  # before its Hello
    desk.round()
    assert [message.kind for message in desk.control if isinstance(message, Kill)] == ["corrupt"]


async def test_a_dead_runner_is_read_to_its_last_whole_frame(desk: Desk) -> None:
    runner = desk.runner("r1")
    token = desk.start(runner)
    for n in range(60):
        runner.say(Event(token=token, type="tick", data=b'"%d' % n + b"x" * 3_000 + b'"'))
    runner.write(runner.frame(Event(token=token, type="tick", data=b"1"))[:-1])
    runner.die(None)
    desk.book.runner_exited("r1", Cause(kind="signal", signal="SIGKILL"))
    events, rounds = [], 0
    while "r1" in desk.book.runners:
        batch = desk.round()
        events += [event.type for event in batch.events]
        rounds += 1
        assert rounds < 20
        if "r1" in desk.book.runners:
            await desk.pipes.wait()  # each round that found something asks for the next one
    assert events.count("tick") == 60
    assert events[-1] == "stream.end"
    assert rounds > 2


async def test_the_end_of_a_pipe_alone_is_not_the_end_of_its_runner(desk: Desk) -> None:
    """Its pidfd decides; the pipe may end first. The gateway does not turn in a busy loop meanwhile."""
    runner = desk.runner("r1")
    desk.start(runner)
    runner.die(None)
    desk.round()
    assert "r1" in desk.book.runners
    assert desk.pipes.next_look() is not None
    assert desk.pipes.look() == []


async def test_a_grandchild_that_holds_the_pipe_open_does_not_delay_the_end(desk: Desk) -> None:
    runner = desk.runner("r1")
    desk.start(runner)
    held = os.dup(runner.events)
    runner.die(None)
    desk.book.runner_exited("r1", Cause(kind="exit", exit_code=3))
    assert [event.type for event in desk.round().events] == ["stream.end"]
    os.close(held)


async def test_output_goes_on_after_an_attempt_that_printed_nothing(desk: Desk) -> None:
    """A pipe that is empty when an attempt ends is not a pipe whose writers have gone."""
    runner = desk.runner("r1", runs=3)
    token = desk.start(runner)
    runner.say(Finished(token=token, ending="returned"))
    desk.book.accept(submission(), 1.0)
    desk.round()
    token = desk.start(runner)
    runner.print(f"\x1eo{token}\x1fheard\n")
    assert [row.text for row in desk.round().outputs] == ["heard"]


async def test_output_before_the_end_marker_is_kept_with_the_run(desk: Desk) -> None:
    runner = desk.runner("r1")
    token = desk.start(runner)
    runner.print(f"\x1eB{token}\x1f\nplain\n\x1eo{token}\x1fmarked\n")
    runner.finish(token)
    batch = desk.round()
    assert [row.text for row in batch.outputs] == ["plain", "marked"]
    assert batch.events[-1].type == "stream.end"


async def test_output_whose_writers_have_gone_is_not_looked_at_for_ever(desk: Desk) -> None:
    runner = desk.runner("r1")
    os.close(runner.output)
    runner.output = os.open(os.devnull, os.O_WRONLY)
    desk.round()
    assert desk.pipes.look() == []


async def test_nothing_is_given_to_a_runner_that_is_gone(desk: Desk) -> None:
    assert not desk.pipes.order("nobody", Start(run="r", attempt=1, token="t", task="t"))


async def test_the_end_of_all_pipes(desk: Desk) -> None:
    runner = desk.runner("r1")
    assert not desk.pipes.at_end()
    runner.die(None)
    assert desk.pipes.at_end()


def test_specs_name_their_pipe() -> None:
    assert RunnerSpec(id="r1").pipe_size == 65536


async def test_an_order_that_finds_no_room_is_given_again_in_its_turn(desk: Desk) -> None:
    """Its socket is full, or no descriptor is left for a large one: a run must not wait for it for ever."""
    runner = desk.runner("r1")
    before = len(runner.orders())
    sent = 0
    while desk.pipes.give("r1", Cancel(token=f"t{sent}")):
        sent += 1
    late = [Cancel(token=f"late{number}") for number in range(3)]
    assert [desk.pipes.give("r1", order) for order in late] == [False] * 3
    assert not desk.pipes.order("r1", Cancel(token="at once")), "it would overtake those that wait"
    look = desk.pipes.next_look()
    assert look is not None
    assert look - trio.current_time() < 0.1
    assert len(runner.orders()) == before + sent
    desk.pipes.look()
    assert runner.orders()[before + sent :] == [Cancel(token=f"t{sent}"), *late]
    assert desk.pipes.next_look() is None


async def test_what_waits_for_a_runner_that_has_gone_is_void(desk: Desk) -> None:
    runner = desk.runner("r1")
    while desk.pipes.give("r1", Cancel(token="t")):
        pass
    runner.close()
    desk.runners.remove(runner)
    desk.pipes.look()
    desk.pipes.drop("r1")
    assert not desk.pipes.give("r1", Cancel(token="t"))
    assert desk.pipes.next_look() is None
