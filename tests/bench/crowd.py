"""A thousand subscribers of one run, and one among them who does not read: whether the others notice."""

from __future__ import annotations

from tests.bench.contestants import Bulkhead, bulkhead, history_of
from tests.bench.fanout import CROWD, DELAY, EVENTS
from tests.bench.figures import Figure, figure, ratio
from tests.bench.readers import raise_descriptors, reading
from tests.bench.registry import benchmark
from tests.bench.usage import come_to_rest

#: Subscribers who do not read, in every other round.
STUCK = 1

#: Events of 4,000 bytes that they are sent first: more than their small buffer and the gateway's take (300 KB).
BEFORE = 100


def p99(ours: Bulkhead, count: int, stuck: int, events: int) -> float:
    """Return the seconds that 99 of 100 events take at most, to those who read."""
    with (
        ours.channel(events, DELAY, before=BEFORE) as channel,
        reading(
            channel.target,
            count - stuck,
            events,
            stuck=stuck,
            stuck_target=history_of(channel.target),  # so that it is stuck at once
        ) as readers,
    ):
        come_to_rest(ours.pids())
        channel.begin()
        heard = readers.heard()
    assert not heard.missing, heard
    return heard.p99


@benchmark("crowd", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """1,000 subscribers at 50 events/s, alternately all alive and one stuck: latency"""
    return measure(repetitions, CROWD, EVENTS)


def measure(repetitions: int, crowd: int, events: int) -> list[Figure]:
    """Measure so many pairs of rounds with so many subscribers and events."""
    raise_descriptors()
    alive: list[float] = []
    stuck: list[float] = []
    with bulkhead() as ours:
        p99(ours, min(crowd, 100), 0, min(events, 50))
        for _ in range(repetitions):
            alive.append(p99(ours, crowd, 0, events))
            stuck.append(p99(ours, crowd, STUCK, events))
    return [
        figure("p99, all alive", "ms", [one * 1e3 for one in alive]),
        figure(f"p99, {STUCK} stuck", "ms", [one * 1e3 for one in stuck]),
        ratio("p99 with a stuck one / without", stuck, alive),
    ]
