"""The ledger of deadlines against a model that is too simple to be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from supervisor.deadlines import DeadlineLedger, Due
from taskkit.wire.messages import Deadline


def deadline(
    after: float, *, runner: str = "r", token: str = "t", kind: str = "timeout", grace: float = 2.0
) -> Deadline:
    return Deadline(runner=runner, token=token, kind=kind, after=after, grace=grace)


def test_an_empty_ledger_waits_for_ever() -> None:
    ledger = DeadlineLedger()
    assert ledger.next() == math.inf
    assert ledger.due(1e12) == []
    assert len(ledger) == 0


def test_a_deadline_passes_once_at_its_time() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10), 100.0)
    assert ledger.next() == 110.0
    assert ledger.due(109.999) == []
    assert ledger.due(110.0) == [Due("r", "t", "timeout", 2.0)]
    assert ledger.due(1000.0) == []
    assert ledger.next() == math.inf


def test_the_earliest_comes_first() -> None:
    ledger = DeadlineLedger()
    for after in (3, 1, 2):
        ledger.arm(deadline(after, token=str(after)), 0)
    assert ledger.next() == 1
    assert [due.token for due in ledger.due(10)] == ["1", "2", "3"]


def test_a_later_order_with_the_same_key_replaces() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10, grace=1), 0)
    ledger.arm(deadline(3, grace=7), 1)
    assert len(ledger) == 1
    assert ledger.due(100) == [Due("r", "t", "timeout", 7)]


@pytest.mark.parametrize(("after", "at"), [(3, 4), (9, 10), (20, 10)])
def test_an_order_of_at_most_keeps_what_is_earlier(after: float, at: float) -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10), 0)
    ledger.arm(msgspec.structs.replace(deadline(after), at_most=True), 1)
    assert (len(ledger), ledger.next()) == (1, at)


def test_an_order_of_at_most_stands_alone_as_well() -> None:
    ledger = DeadlineLedger()
    ledger.arm(msgspec.structs.replace(deadline(3), at_most=True), 1)
    assert ledger.next() == 4


@pytest.mark.parametrize(
    ("runner", "token", "kind"), [("x", "t", "timeout"), ("r", "x", "timeout"), ("r", "t", "cancelled")]
)
def test_another_runner_token_or_kind_is_another_deadline(runner: str, token: str, kind: str) -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(1), 0)
    ledger.arm(deadline(2, runner=runner, token=token, kind=kind), 0)
    assert len(ledger.due(5)) == 2


def test_an_attempt_is_disarmed_with_all_its_kinds_and_no_other() -> None:
    ledger = DeadlineLedger()
    for kind in ("timeout", "cancelled"):
        for token in ("a", "b"):
            ledger.arm(deadline(1, token=token, kind=kind), 0)
    ledger.arm(deadline(1, runner="other", token="a"), 0)
    ledger.disarm("r", "a")
    assert {(due.runner, due.token) for due in ledger.due(5)} == {("r", "b"), ("other", "a")}


def test_a_dead_runner_is_disarmed_altogether() -> None:
    ledger = DeadlineLedger()
    for token in ("a", "b"):
        ledger.arm(deadline(1, token=token), 0)
    ledger.arm(deadline(1, runner="other"), 0)
    ledger.disarm("r")
    assert [due.runner for due in ledger.due(5)] == ["other"]


def test_disarming_what_is_not_there_is_fine() -> None:
    ledger = DeadlineLedger()
    ledger.disarm("nobody")
    ledger.disarm("nobody", "nothing")
    assert len(ledger) == 0


def test_time_stands_still_while_paused() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10), 0)
    ledger.pause(4)
    assert ledger.next() == math.inf
    assert ledger.due(1000) == []
    ledger.resume(100)
    assert ledger.next() == 106, "six seconds were left"
    assert ledger.due(105.9) == []
    assert len(ledger.due(106)) == 1


def test_a_deadline_set_during_a_pause_has_all_its_time_afterwards() -> None:
    ledger = DeadlineLedger()
    ledger.pause(0)
    ledger.arm(deadline(5), 10)
    ledger.resume(20)
    assert ledger.next() == 25


def test_pausing_twice_is_one_pause_from_the_first_on() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10), 0)
    ledger.pause(1)
    ledger.pause(5)
    ledger.resume(11)
    assert ledger.next() == 20


def test_resuming_what_is_not_paused_changes_nothing() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(10), 0)
    ledger.resume(7)
    assert ledger.next() == 10


def test_a_deadline_may_be_taken_back_during_a_pause() -> None:
    ledger = DeadlineLedger()
    ledger.arm(deadline(1), 0)
    ledger.pause(0.5)
    ledger.disarm("r", "t")
    ledger.resume(50)
    assert ledger.due(100) == []


@dataclass
class _Left:
    seconds: int
    grace: int


class LedgerMachine(RuleBasedStateMachine):
    """The model keeps the seconds that are left, and takes one off for each that passes unpaused."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = DeadlineLedger()
        self.left: dict[tuple[str, str, str], _Left] = {}
        self.now = 1000
        self.paused = False

    @rule(
        runner=st.sampled_from("rs"),
        token=st.sampled_from("ab"),
        kind=st.sampled_from(["timeout", "cancelled"]),
        after=st.integers(0, 20),
        grace=st.integers(0, 5),
    )
    def arm(self, runner: str, token: str, kind: str, after: int, grace: int) -> None:
        order = Deadline(runner=runner, token=token, kind=kind, after=after, grace=grace)
        self.ledger.arm(order, self.now)
        self.left[runner, token, kind] = _Left(after, grace)

    @rule(runner=st.sampled_from("rs"), token=st.sampled_from(["a", "b", None]))
    def disarm(self, runner: str, token: str | None) -> None:
        self.ledger.disarm(runner, token)
        self.left = {
            key: left
            for key, left in self.left.items()
            if key[0] != runner or (token is not None and key[1] != token)
        }

    @rule()
    def pause(self) -> None:
        self.ledger.pause(self.now)
        self.paused = True

    @rule()
    def resume(self) -> None:
        self.ledger.resume(self.now)
        self.paused = False

    @rule(seconds=st.integers(0, 15))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        if not self.paused:
            for left in self.left.values():
                left.seconds -= seconds

    @rule()
    def collect(self) -> None:
        expected = {} if self.paused else {k: v for k, v in self.left.items() if v.seconds <= 0}
        found = self.ledger.due(self.now)
        assert {(d.runner, d.token, d.kind): d.grace for d in found} == {
            key: left.grace for key, left in expected.items()
        }
        order = [expected[due.runner, due.token, due.kind].seconds for due in found]
        assert order == sorted(order), "earliest first"
        for key in expected:
            del self.left[key]

    @invariant()
    def the_next_one_is_known(self) -> None:
        expected = math.inf
        if self.left and not self.paused:
            expected = self.now + min(left.seconds for left in self.left.values())
        assert self.ledger.next() == expected
        assert len(self.ledger) == len(self.left)


TestLedger = LedgerMachine.TestCase
