"""Restart policy against a list of deaths: no restart too many, no wait too long."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from supervisor.policy import FIRST_DELAY, FORGET_AFTER, RestartPolicy


class Restarts(RuleBasedStateMachine):
    """A child that dies and is started again, until it is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.deaths: list[float] = []
        self.streak = 0
        self.ready_at: float | None = None
        self.given_up = False
        self.down = False
        self.full = 0.0

    @initialize(
        intensity=st.none() | st.integers(0, 6),
        period=st.floats(1, 200),
        longest=st.floats(0.1, 60),
        start=st.floats(0, 1e6),
        seed=st.integers(0, 2**32),
    )
    def make(self, intensity: int | None, period: float, longest: float, start: float, seed: int) -> None:
        self.now = start
        self.longest, self.period, self.intensity = longest, period, intensity
        self.policy = RestartPolicy(
            intensity=intensity, period=period, longest_delay=longest, jitter=random.Random(seed)
        )

    @rule(seconds=st.floats(0, 300))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: not self.given_up)
    @rule()
    def ready(self) -> None:
        self.policy.ready(self.now)
        if self.ready_at is None:
            self.ready_at = self.now

    @precondition(lambda self: not self.given_up)
    @rule()
    def die(self) -> None:
        if self.ready_at is not None and self.now - self.ready_at >= FORGET_AFTER:
            self.deaths, self.streak, self.full = [], 0, 0.0
        self.ready_at = None
        self.deaths = [at for at in self.deaths if self.now - at <= self.period] + [self.now]
        delay = self.policy.died(self.now)
        assert self.policy.restarts == len(self.deaths)
        too_many = self.intensity is not None and len(self.deaths) > self.intensity
        assert (delay is None) == too_many, "it is given up exactly when the intensity is exceeded"
        self.given_up = too_many
        if delay is not None:
            self.check_wait(delay)

    def check_wait(self, delay: float) -> None:
        full = min(FIRST_DELAY * 2 ** min(self.streak, 16), self.longest)
        self.streak += 1
        assert 0.75 * full <= delay <= full, "jitter takes off at most a quarter"
        assert full >= self.full, "without forgiveness the waits never become shorter"
        self.full = full


TestRestarts = Restarts.TestCase
