"""The restart policy: when a child comes back, and when nobody tries any more."""

from __future__ import annotations

import random

import pytest

from supervisor.policy import FIRST_DELAY, FORGET_AFTER, LONGEST_DELAY, RestartPolicy


class NoJitter(random.Random):
    """Always takes nothing off."""

    def random(self) -> float:
        return 0.0


class FullJitter(random.Random):
    """Always takes off as much as can be."""

    def random(self) -> float:
        return 1.0


def delays(policy: RestartPolicy, count: int) -> list[float | None]:
    """Let the child die `count` times, each time at once after its restart."""
    now, found = 0.0, []
    for _ in range(count):
        delay = policy.died(now)
        found.append(delay)
        now += delay or 0.0
    return found


def test_each_wait_is_twice_the_last_up_to_the_longest() -> None:
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0]
    assert delays(policy, 12) == pytest.approx(expected)


def test_the_longest_wait_holds_however_often_it_dies() -> None:
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    assert delays(policy, 3000)[-1] == LONGEST_DELAY


def test_jitter_takes_off_at_most_a_quarter(rng: random.Random) -> None:
    for seed in range(200):
        policy = RestartPolicy(intensity=None, jitter=random.Random(rng.random() + seed))
        for number, delay in enumerate(delays(policy, 15)):
            full = min(FIRST_DELAY * 2**number, LONGEST_DELAY)
            assert delay is not None
            assert 0.75 * full <= delay <= full


def test_the_same_jitter_gives_the_same_waits() -> None:
    first, second = (RestartPolicy(intensity=None, jitter=random.Random(7)) for _ in range(2))
    assert delays(first, 20) == delays(second, 20)


def test_two_children_that_died_together_come_back_apart() -> None:
    first, second = RestartPolicy(), RestartPolicy()
    assert delays(first, 8) != delays(second, 8)


@pytest.mark.parametrize("intensity", [0, 1, 3, 10])
def test_one_death_beyond_the_intensity_is_one_too_many(intensity: int) -> None:
    policy = RestartPolicy(intensity=intensity)
    answers = [policy.died(1000.0) for _ in range(intensity + 1)]
    assert None not in answers[:-1]
    assert answers[-1] is None
    assert policy.restarts == intensity + 1


@pytest.mark.parametrize("jitter", [NoJitter(), FullJitter(), random.Random(1)], ids=["none", "full", "some"])
@pytest.mark.parametrize("up", [0.0, 0.5, 3.0])
def test_a_child_that_keeps_dying_is_given_up_by_default(jitter: random.Random, up: float) -> None:
    # The waits grow, so the window has to be longer than all of them together: else nobody ever gives up.
    policy, now = RestartPolicy(jitter=jitter), 0.0
    for _ in range(100):
        policy.ready(now)
        now += up
        delay = policy.died(now)
        if delay is None:
            return
        now += delay
    raise AssertionError("died a hundred times and came back a hundred times")


def test_deaths_age_out_of_the_period() -> None:
    policy = RestartPolicy(intensity=2, period=60)
    assert policy.died(0) is not None
    assert policy.died(30) is not None
    assert policy.died(61) is not None, "the first is 61 s old"
    assert policy.restarts == 2
    assert policy.died(62) is None


def test_a_death_exactly_one_period_ago_still_counts() -> None:
    policy = RestartPolicy(intensity=1, period=60)
    assert policy.died(0) is not None
    assert policy.died(60) is None


def test_no_intensity_never_gives_up() -> None:
    policy = RestartPolicy(intensity=None)
    assert None not in [policy.died(5.0) for _ in range(500)]


def test_a_minute_up_forgets_everything() -> None:
    policy = RestartPolicy(intensity=3, jitter=NoJitter())
    for _ in range(3):
        policy.died(0)
    policy.ready(10)
    assert policy.died(10 + FORGET_AFTER) == pytest.approx(FIRST_DELAY)
    assert policy.restarts == 1


def test_less_than_a_minute_up_forgets_nothing() -> None:
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    policy.died(0)
    policy.ready(1)
    assert policy.died(1 + FORGET_AFTER - 0.001) == pytest.approx(2 * FIRST_DELAY)


def test_a_child_that_was_never_ready_is_not_forgiven_by_time() -> None:
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    policy.died(0)
    assert policy.died(10_000) == pytest.approx(2 * FIRST_DELAY)


def test_readiness_counts_for_one_life_only() -> None:
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    policy.ready(0)
    policy.died(1)
    assert policy.died(1000) == pytest.approx(2 * FIRST_DELAY), "this life was never ready"


def test_ready_again_and_again_is_ready_since_the_first_time() -> None:
    # A pool says so at every birth; otherwise a busy one would never have been up for a minute.
    policy = RestartPolicy(intensity=None, jitter=NoJitter())
    for number in range(5):
        policy.died(number)
    for second in range(10, 100):
        policy.ready(second)
    assert policy.died(100) == pytest.approx(FIRST_DELAY)
