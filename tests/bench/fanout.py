"""One speaker, a thousand subscribers, ours beside other servers."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.contests import (
    EVENTSTREAM,
    HYPERCORN,
    NCHAN,
    OURS,
    PEERS,
    STARLETTE,
    against,
    compete,
    contestants,
    losses,
    plain,
)
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.registry import benchmark

CROWD = 1_000

#: Seconds between two events: 50 a second, as a busy progress bar. Events of such a round.
DELAY = 0.02
EVENTS = 100

#: Events of a round for those who cannot keep up with that: a fraction, or a round would take a minute.
FEWER = {STARLETTE: 30, EVENTSTREAM: 20, HYPERCORN: 20}

#: Events of a round for which nobody waits between two.
UNPACED = {OURS: 2_000, NCHAN: 500, STARLETTE: 50}


@benchmark("fanout", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """1,000 subscribers at 50 events/s beside four peers: CPU per delivery, latency"""
    return measure(repetitions, CROWD, EVENTS, tuple(PEERS))


def measure(repetitions: int, crowd: int, events: int, peers: Sequence[str]) -> list[Figure]:
    """Measure so many rounds with so many subscribers and events, beside these peers."""
    with contestants(peers) as running:
        found = compete(running, repetitions, crowd, lambda name: FEWER.get(name, events), DELAY)
    return [
        *plain("CPU per delivery", "us", "cost", found, 1e6),
        *plain("p50", "ms", "p50", found, 1e3),
        *plain("p99", "ms", "p99", found, 1e3),
        *against(
            "CPU per delivery",
            "cost",
            found,
            {
                NCHAN: at_most(1.2),
                STARLETTE: at_most(1 / 7),
                EVENTSTREAM: at_most(1 / 15),
                HYPERCORN: None,
            },
        ),
        *against("p50", "p50", found, {NCHAN: at_most(0.6)}),
        *against("p99", "p99", found, {NCHAN: at_most(0.8)}),
        *losses(found),
    ]


@benchmark("unpaced", repetitions=5)
def run_unpaced(repetitions: int) -> list[Figure]:
    """1,000 subscribers, a publisher that never waits, beside two peers: most deliveries per second"""
    return measure_unpaced(repetitions, CROWD, UNPACED)


def measure_unpaced(repetitions: int, crowd: int, events: dict[str, int]) -> list[Figure]:
    """Measure so many rounds, beside the peers for whom there is a number of events."""
    with contestants([name for name in events if name != OURS]) as running:
        found = compete(running, repetitions, crowd, events.__getitem__, 0.0)
    return [
        *plain("deliveries", "1/s", "rate", found),
        *plain("CPU per delivery", "us", "cost", found, 1e6),
        *against("deliveries", "rate", found, {NCHAN: at_least(1.5), STARLETTE: at_least(20)}),
        *losses(found),
    ]
