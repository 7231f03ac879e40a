"""What a delivery costs, and how late it is, as the crowd grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.bench.contests import NCHAN, against, compete, contestants, losses, one_round, plain
from tests.bench.figures import Figure, at_most, figure
from tests.bench.registry import benchmark

#: A crowd of 10,000, five events a second for six seconds.
LARGE = 10_000
SLOW = 0.2
EVENTS = 30

#: Seconds between two events by the size of the crowd: 50,000 deliveries a second at most, more than that is backlog.
SIZES = {10: 0.02, 100: 0.02, 1_000: 0.02, LARGE: SLOW}


@benchmark("large", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """10,000 subscribers at 5 events/s beside nchan: latency, nobody dropped"""
    return measure(repetitions, LARGE, EVENTS, (NCHAN,))


def measure(repetitions: int, crowd: int, events: int, peers: Sequence[str]) -> list[Figure]:
    """Measure so many rounds with so many subscribers and events, beside these peers."""
    with contestants(peers) as running:
        found = compete(running, repetitions, crowd, lambda _: events, SLOW)
    return [
        *plain("p50", "ms", "p50", found, 1e3),
        *plain("p99", "ms", "p99", found, 1e3),
        *plain("CPU per delivery", "us", "cost", found, 1e6),
        *against("p50", "p50", found, {NCHAN: at_most(1.0)}),
        *against("p99", "p99", found, {NCHAN: at_most(1.0)}),
        *losses(found),
    ]


@benchmark("growth", repetitions=5)
def run_growth(repetitions: int) -> list[Figure]:
    """10, 100, 1,000, 10,000 subscribers: the gateway's CPU per delivery"""
    return measure_growth(repetitions, SIZES, EVENTS)


def measure_growth(repetitions: int, sizes: Mapping[int, float], events: int) -> list[Figure]:
    """Measure so many rounds with crowds of these sizes, at their pace, of so many events at least."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    with contestants(()) as running:
        for _ in range(repetitions):
            for size, delay in sizes.items():
                number = max(events, round(2 / delay))
                for contestant in running.values():
                    found[size].append(one_round(contestant, size, number, delay).cost)
    return [
        figure(
            f"{size:,} subscribers at {1 / sizes[size]:.0f} events/s: CPU per delivery",
            "us",
            [c * 1e6 for c in costs],
        )
        for size, costs in found.items()
    ]
