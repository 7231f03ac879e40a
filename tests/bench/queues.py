"""Races of queues: how soon a body begins, how many are performed per second."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from tests.bench.figures import Figure, at_least, at_most, figure, ratio
from tests.bench.peers.contestants import Contestant, Maker, ours
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave

#: Ours by the name that it has in every table.
OURS = "Bulkhead"

PEERS: Mapping[str, Maker] = {}

#: Submissions of a round, and seconds between two of them: each finds its queue idle.
STARTS = 12
PAUSE = 0.1

#: No-ops of a round, by contestant: about a second and a half of each one's time.
FRESH_RUNS = 400
REUSED_RUNS = 3_000

#: Runs that one process performs until it is replaced: more than there are.
MANY = 1_000_000

#: Peers' processes; our reuse pool has as many.
WORKERS = 2


def median(samples: list[float]) -> float:
    """Return the nearest-rank median."""
    return sorted(samples)[(len(samples) - 1) // 2]


@benchmark("submit", repetitions=5)
def run_starts(repetitions: int) -> list[Figure]:
    """from a submission in a Django process to the body's first act, a fresh process per run, beside peers"""
    return starts(repetitions, STARTS, PEERS)


def starts(rounds: int, n: int, peers: Mapping[str, Maker]) -> list[Figure]:
    """Measure so many rounds of `n` submissions one after the other."""
    with ExitStack() as stack:
        up = {name: stack.enter_context(maker()) for name, maker in {OURS: ours, **peers}.items()}
        found = interleave(rounds, {name: partial(one.starts, n, PAUSE) for name, one in up.items()})
    name = "submit -> body starts"
    figures = [
        figure(f"{name}, {who}", "ms", [s * 1e3 for some in samples for s in some])
        for who, samples in found.items()
    ]
    medians = {who: [median(some) for some in samples] for who, samples in found.items()}
    goals = {"RQ": at_most(0.5), "Celery": at_most(1.5)}
    return figures + [
        ratio(f"{name}, {OURS} / {who}", medians[OURS], medians[who], *([goals[who]] if who in goals else []))
        for who in peers
    ]


#: No-ops per second that ours is to reach, and how many times as many as a peer.
FRESH_GOALS = {OURS: 200.0, "RQ": 2.0}
REUSE_GOALS = {OURS: 2_000.0, "Celery": 3.0, "Huey": 1.1, "django-tasks": 15.0}


@benchmark("fresh", repetitions=5)
def run_fresh(repetitions: int) -> list[Figure]:
    """no-op runs per second, durable, a fresh process per run, beside RQ"""
    return rates("a process per run", repetitions, ours, FRESH_GOALS, {OURS: FRESH_RUNS})


@benchmark("reuse", repetitions=5)
def run_reuse(repetitions: int) -> list[Figure]:
    """no-op runs per second, durable, two processes that are used again, beside peers with two"""
    return rates(f"{WORKERS} processes", repetitions, ours_reused, REUSE_GOALS, {OURS: REUSED_RUNS})


def ours_reused() -> AbstractContextManager[Contestant]:
    """Have a tree whose default pool is two processes for any number of runs."""
    return ours(runners=WORKERS, pools={"default": {"runs": MANY}})


def rates(
    what: str, rounds: int, maker: Maker, goals: Mapping[str, float], runs: Mapping[str, int]
) -> list[Figure]:
    """Measure so many rounds of no-ops submitted at once, as many by each contestant as `runs` says."""
    makers = {OURS: maker, **PEERS}
    with ExitStack() as stack:
        up = {name: stack.enter_context(makers[name]()) for name in runs}
        found = interleave(rounds, {name: partial(one.rate, runs[name]) for name, one in up.items()})
    name = f"no-op runs, {what}"
    figures = [
        figure(
            f"{name}, {who}",
            "1/s",
            samples,
            *([at_least(goals[who])] if who == OURS and who in goals else []),
        )
        for who, samples in found.items()
    ]
    return figures + [
        ratio(
            f"{name}, {OURS} / {who}",
            found[OURS],
            samples,
            *([at_least(goals[who])] if who in goals else []),
        )
        for who, samples in found.items()
        if who != OURS
    ]
