"""Failures per address: what counts, for how long, in how much memory."""

from __future__ import annotations

import pytest

from gateway.failures import PERIOD, Failures, address_of


def test_the_eleventh_within_a_minute_has_to_wait() -> None:
    failures = Failures(10)
    assert [failures.note("a", float(n)) for n in range(10)] == [0.0] * 10
    assert failures.note("a", 20.0) == 40.0
    assert failures.note("b", 20.0) == 0.0


def test_trying_on_does_not_make_it_longer() -> None:
    failures = Failures(2)
    for moment in (0.0, 1.0, 5.0, 59.0):
        failures.note("a", moment)
    assert failures.note("a", PERIOD) == 0.0  # the first is a minute old
    assert failures.wait("a", PERIOD) == 1.0  # the second is not


def test_failures_far_apart_do_not_add_up() -> None:
    failures = Failures(2)
    assert [failures.note("a", n * 31.0) for n in range(20)] == [0.0] * 20


def test_zero_is_no_limit_and_no_memory() -> None:
    failures = Failures(0)
    assert [failures.note("a", 0.0) for _ in range(100)] == [0.0] * 100
    assert len(failures) == 0


def test_memory_is_bounded_and_forgets_who_failed_longest_ago() -> None:
    failures = Failures(1, addresses=3)
    for n, address in enumerate(["a", "b", "c", "a", "d"]):
        failures.note(address, float(n))
    assert len(failures) == 3
    assert failures.wait("a", 5.0) > 0, "it tried last but one"
    assert failures.wait("b", 5.0) == 0


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (None, ""),
        (("192.0.2.1", 5), "192.0.2.1"),
        (("::ffff:192.0.2.1", 5), "192.0.2.1"),
        (("2001:db8:1:2:3::4", 5), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5), "fe80::/64"),
        (("testclient", 5), "testclient"),
    ],
)
def test_what_a_peer_counts_as(client: tuple[str, int] | None, address: str) -> None:
    assert address_of(client) == address
