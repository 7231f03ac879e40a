"""The session of one events pipe, against a model of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from taskkit.errors import UnexpectedMessage
from taskkit.wire.messages import Created, Event, Finished, Hello, Progress, RunnerMessage, Started
from taskkit.wire.session import AttemptState, Judgement, RunnerSession, SessionState

TOKENS = ("a", "b", "c")
HELLO = Hello(runner="r", pid=1)


def ended(token: str) -> Finished:
    return Finished(token=token, ending="returned")


def opened(*tokens: str) -> RunnerSession:
    """Return a session that has said Hello and got these orders."""
    session = RunnerSession()
    session.receive(1, HELLO)
    for token in tokens:
        session.expect(token)
    return session


def test_one_attempt_from_hello_to_finished() -> None:
    session = opened("a")
    script: list[RunnerMessage] = [
        Started(token="a"),
        Event(token="a", type="x", data=b"{}"),
        Progress(token="a", data=b"{}"),
        ended("a"),
    ]
    assert [session.receive(seq, message) for seq, message in enumerate(script, 2)] == [Judgement.STORE] * 4
    assert session.seq == 5
    assert session.attempts == {}


def test_a_frame_seen_before_is_a_duplicate_and_changes_nothing() -> None:
    session = opened("a")
    session.receive(2, Started(token="a"))
    for seq in (1, 2):
        assert session.receive(seq, ended("a")) is Judgement.DUPLICATE
    assert session.attempts == {"a": AttemptState.STARTED}
    assert session.duplicates == 2
    assert session.seq == 2


def test_an_adopted_pipe_needs_no_second_hello() -> None:
    session = RunnerSession(stored_seq=7)
    session.expect("a", AttemptState.STARTED)
    assert session.receive(7, HELLO) is Judgement.DUPLICATE
    assert session.receive(8, ended("a")) is Judgement.STORE


@pytest.mark.parametrize("message", [Started(token="x"), Event(token="x", type="t"), ended("x")], ids=str)
def test_an_attempt_nobody_ordered_is_a_stray(message: RunnerMessage) -> None:
    session = opened("a")
    assert session.receive(2, message) is Judgement.STRAY
    assert session.strays == 1
    assert session.seq == 2, "a stray is consumed like any frame"


def test_frames_after_finished_or_forget_are_strays() -> None:
    session = opened("a", "b")
    session.receive(2, Started(token="a"))
    session.receive(3, ended("a"))
    session.forget("b")
    session.forget("never ordered")
    assert session.receive(4, Event(token="a", type="late")) is Judgement.STRAY
    assert session.receive(5, Started(token="b")) is Judgement.STRAY


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([Started(token="a")], "before Hello"),
        ([Created(ask="q")], "before Hello"),
        ([HELLO, HELLO], "second Hello"),
        ([HELLO, Event(token="a", type="x")], "before Started"),
        ([HELLO, Progress(token="a", data=b"{}")], "before Started"),
        ([HELLO, ended("a")], "before Started"),
        ([HELLO, Started(token="a"), Started(token="a")], "Started twice"),
    ],
)
def test_out_of_order_breaks_the_protocol(messages: list[RunnerMessage], why: str) -> None:
    session = RunnerSession()
    session.expect("a")
    for seq, message in enumerate(messages[:-1], 1):
        session.receive(seq, message)
    with pytest.raises(UnexpectedMessage, match=why):
        session.receive(len(messages), messages[-1])
    assert session.state is SessionState.CLOSED
    assert session.seq == len(messages) - 1, "the frame that broke it does not count as received"


def test_a_hole_in_the_numbers_breaks_the_protocol() -> None:
    session = opened("a")
    with pytest.raises(UnexpectedMessage, match="frame 3 follows frame 1"):
        session.receive(3, Started(token="a"))
    assert session.state is SessionState.CLOSED


class SessionMachine(RuleBasedStateMachine):
    """Any sequence of orders and frames, judged by rules that are written down independently."""

    def __init__(self) -> None:
        super().__init__()
        self.session = RunnerSession()
        self.greeted = False
        self.closed = False
        self.seq = 0
        self.ordered: set[str] = set()
        self.running: set[str] = set()
        self.counts = {Judgement.DUPLICATE: 0, Judgement.STRAY: 0}

    def rightful(self, message: RunnerMessage) -> Judgement | None:
        """Return the judgement of a frame with the right number, or None when it breaks the protocol."""
        if isinstance(message, Hello):
            return None if self.greeted else Judgement.STORE
        if not self.greeted:
            return None
        if isinstance(message, Created):
            return Judgement.STORE
        if message.token in self.running:
            return None if isinstance(message, Started) else Judgement.STORE
        if message.token in self.ordered:
            return Judgement.STORE if isinstance(message, Started) else None
        return Judgement.STRAY

    def accept(self, message: RunnerMessage) -> None:
        """Note what a stored frame means."""
        if isinstance(message, Hello):
            self.greeted = True
        elif isinstance(message, Started):
            self.ordered.discard(message.token)
            self.running.add(message.token)
        elif isinstance(message, Finished):
            self.running.discard(message.token)

    @rule(token=st.sampled_from(TOKENS))
    def order(self, token: str) -> None:
        self.session.expect(token)
        self.running.discard(token)
        self.ordered.add(token)

    @rule(token=st.sampled_from(TOKENS))
    def adopt(self, token: str) -> None:
        self.session.expect(token, AttemptState.STARTED)
        self.ordered.discard(token)
        self.running.add(token)

    @rule(token=st.sampled_from(TOKENS))
    def end_from_outside(self, token: str) -> None:
        self.session.forget(token)
        self.ordered.discard(token)
        self.running.discard(token)

    @rule(
        message=st.one_of(
            st.just(HELLO),
            st.just(Created(ask="q")),
            st.builds(Started, token=st.sampled_from(TOKENS)),
            st.builds(Event, token=st.sampled_from(TOKENS), type=st.just("x")),
            st.builds(Progress, token=st.sampled_from(TOKENS), data=st.just(b"{}")),
            st.builds(ended, st.sampled_from(TOKENS)),
        ),
        step=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 0, -1, 2]),
    )
    def frame(self, message: Any, step: int) -> None:
        seq = self.seq + step
        judgement = None if self.closed else Judgement.DUPLICATE if step <= 0 else self.rightful(message)
        if judgement is None or (step == 2 and not self.closed):
            with pytest.raises(UnexpectedMessage):
                self.session.receive(seq, message)
            self.closed = True
            return
        assert self.session.receive(seq, message) is judgement
        if judgement in self.counts:
            self.counts[judgement] += 1
        if judgement is Judgement.STORE:
            self.accept(message)
        self.seq = max(self.seq, seq)

    @precondition(lambda self: self.seq > 20)
    @rule()
    def close(self) -> None:
        self.session.close()
        self.closed = True

    @invariant()
    def agrees(self) -> None:
        assert self.session.seq == self.seq
        assert (self.session.state is SessionState.CLOSED) == self.closed
        assert {t for t, s in self.session.attempts.items() if s is AttemptState.ORDERED} == self.ordered
        assert {t for t, s in self.session.attempts.items() if s is AttemptState.STARTED} == self.running
        assert self.session.duplicates == self.counts[Judgement.DUPLICATE]
        assert self.session.strays == self.counts[Judgement.STRAY]


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=200, stateful_step_count=40)
