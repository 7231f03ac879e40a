"""How many events a second the store takes in from runs that speak as fast as they can, each its fair part."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.bench.figures import Figure, at_least, figure
from tests.bench.registry import benchmark
from tests.bench.trees import RUNNERS, cancelled_at_end, demo_tree
from tests.bench.usage import cpu_seconds
from tests.helpers import Tree, eventually

#: Runs that flood, one per runner, and the bytes of each event's own data.
FLOODS = RUNNERS
SIZE = 100

#: Seconds of one measurement, after so many of warming up.
SECONDS = 10.0
WARM_UP = 1.0

#: More events than a measurement could hold.
ENDLESS = 1_000_000_000


@contextmanager
def flooding(tree: Tree, count: int, size: int) -> Iterator[list[str]]:
    """Have so many runs flood, without subscribers, while the block runs; give their ids."""
    with cancelled_at_end(tree, [("demo.flood", {"n": ENDLESS, "size": size})] * count) as runs:
        eventually(lambda: all(tail(tree, run) > 1 for run in runs), 30.0, "floods")
        yield runs


def tail(tree: Tree, run: str) -> int:
    """Return how many events a run has in the store."""
    return int(tree.snapshot(run)["offsets"]["last"])


def watch(tree: Tree, runs: Sequence[str], seconds: float) -> tuple[float, float, float]:
    """Return (events stored per second, slowest / fastest run, seconds of the gateway's CPU per event)."""
    gateway = tree.child("gateway").pid
    marks = []
    for pause in (seconds, 0.0):
        marks.append((time.monotonic(), [tail(tree, run) for run in runs], cpu_seconds([gateway])))
        time.sleep(pause)
    (began, first, used), (ended, last, used_then) = marks
    told = [after - before for before, after in zip(first, last, strict=True)]
    return sum(told) / (ended - began), min(told) / max(told), (used_then - used) / sum(told)


@benchmark("ingest", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """4 runs that flood for 10 s: durable events per second, fairness, the gateway's CPU per event"""
    return measure(repetitions, SECONDS)


def measure(rounds: int, seconds: float) -> list[Figure]:
    """Measure so many rounds of so many seconds, each in a fresh tree: an old store is as large as it has become."""
    found = []
    for _ in range(rounds):
        with demo_tree() as tree, flooding(tree, FLOODS, SIZE) as runs:
            time.sleep(min(WARM_UP, seconds))
            found.append(watch(tree, runs, seconds))
    return [
        figure(f"{FLOODS} floods: events stored", "1/s", [rate for rate, _, _ in found], at_least(50_000)),
        figure(f"{FLOODS} floods: slowest / fastest", "x", [fair for _, fair, _ in found], at_least(0.7)),
        figure(f"{FLOODS} floods: CPU of the gateway per event", "us", [cpu * 1e6 for _, _, cpu in found]),
    ]
