"""The life of a run: any endings in any order lead to exactly one terminal state, in a bounded number of attempts."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from taskkit.errors import LifecycleError
from taskkit.lifecycle import (
    QUARANTINE_AFTER,
    RUN_TRANSITIONS,
    Ending,
    RunEvent,
    RunStatus,
    next_run_status,
    verdict,
)


class RunLife(RuleBasedStateMachine):
    """One run as the gateway moves it: by the verdict on each attempt, or by a cancellation while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.status = RunStatus.READY
        self.attempts = self.counted = self.crashes = 0
        self.cancelling = False
        self.delay = 0.0
        self.ended_as: list[RunStatus] = []

    @initialize(
        max_attempts=st.integers(1, 6),
        on_lost=st.sampled_from(["retry", "fail"]),
    )
    def submit(self, max_attempts: int, on_lost: str) -> None:
        self.max_attempts, self.on_lost = max_attempts, on_lost

    def move(self, event: RunEvent) -> None:
        self.status = next_run_status(self.status, event)
        if self.status.is_terminal:
            self.ended_as.append(self.status)

    @precondition(lambda self: self.status is RunStatus.READY)
    @rule()
    def start(self) -> None:
        self.attempts += 1
        self.counted += 1
        self.move(RunEvent.START)

    @precondition(lambda self: self.status is RunStatus.READY)
    @rule()
    def cancel_while_it_waits(self) -> None:
        self.move(RunEvent.CANCEL)

    @precondition(lambda self: self.status is RunStatus.RUNNING)
    @rule()
    def ask_to_stop(self) -> None:
        self.cancelling = True

    @precondition(lambda self: self.status is RunStatus.RUNNING)
    @rule(
        ending=st.sampled_from(Ending),
        retry_in=st.none() | st.floats(-10, 1e6),
        stopping=st.booleans(),
    )
    def end_attempt(self, ending: Ending, retry_in: float | None, stopping: bool) -> None:
        if ending is Ending.LOST:
            self.counted -= 1
        if ending is Ending.CRASHED:
            self.crashes += 1
        decision = verdict(
            ending,
            attempts=max(self.counted, 1),
            max_attempts=self.max_attempts,
            on_lost=self.on_lost,
            cancelling=self.cancelling,
            retry_in=retry_in,
            lost=0 if stopping else self.attempts - self.counted,
            crashes=self.crashes,
        )
        self.delay = decision.delay
        self.move(decision.event)
        back = self.status is RunStatus.READY
        assert back == (decision.event in (RunEvent.RETRY, RunEvent.PUT_BACK))
        assert back or self.delay == 0.0
        assert not (self.cancelling and back), "who is asked to stop is not tried again"
        if ending is Ending.RETURNED:
            assert self.status is RunStatus.SUCCESSFUL
        if decision.quarantined:
            assert (self.status, ending) == (RunStatus.FAILED, Ending.CRASHED)

    @rule(event=st.sampled_from(RunEvent))
    def anything_else_changes_nothing(self, event: RunEvent) -> None:
        if event not in RUN_TRANSITIONS[self.status]:
            with pytest.raises(LifecycleError):
                next_run_status(self.status, event)

    @invariant()
    def ends_at_most_once(self) -> None:
        assert len(self.ended_as) <= 1
        assert bool(self.ended_as) == self.status.is_terminal

    @invariant()
    def is_bounded(self) -> None:
        assert self.counted <= getattr(self, "max_attempts", 1), "no attempt too many"
        assert self.crashes <= QUARANTINE_AFTER, "no runner too many"
        assert 0.0 <= self.delay < math.inf


TestRunLife = RunLife.TestCase
