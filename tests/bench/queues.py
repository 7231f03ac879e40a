"""Races of queues: how soon a body begins, how many are performed per second."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from tests.bench.figures import Figure, at_least, at_most, figure, median, ratio
from tests.bench.peers.contestants import Maker, ours
from tests.bench.peers.queues import OURS, PEERS, WORKERS, streaming_coordinator
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave

#: Those that are asked for the time of a single start; Dramatiq comes in where something dies.
STARTERS = ("RQ", "Celery", "Huey", "django-tasks", "Procrastinate")

#: Ours, with many submitted from Django in one transaction instead of by the batch endpoint.
ROWS = f"{OURS} by Django"

#: Submissions of a round, and seconds between two of them: each finds its queue idle.
STARTS = 12
PAUSE = 0.05

#: No-ops of a round, by contestant: enough for a second or two of each one's time.
FRESH_RUNS = {OURS: 400, ROWS: 400, "RQ": 200}
REUSE_RUNS = {
    OURS: 3_000,
    ROWS: 400,
    "Celery": 1_000,
    "Huey": 2_000,
    "django-tasks": 200,
    "Procrastinate": 600,
}

#: Runs that one process performs until it is replaced: more than there are.
MANY = 1_000_000


@benchmark("submit", repetitions=5)
def run_starts(repetitions: int) -> list[Figure]:
    """from a submission in a Django process to the body's first act, a fresh process per run, beside peers"""
    return starts(repetitions, STARTS, {name: PEERS[name] for name in STARTERS})


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


@benchmark("first", repetitions=5)
def run_firsts(repetitions: int) -> list[Figure]:
    """from a submission to the first event at a subscriber, beside django-streaming-coordinator"""
    return firsts(repetitions, STARTS, {"django-streaming-coordinator": streaming_coordinator})


def firsts(rounds: int, n: int, peers: Mapping[str, Maker]) -> list[Figure]:
    """Measure so many rounds of `n` submissions one after the other.

    The peer makes no process: it performs the body in that of its server. `start` holds ours against its goal.
    """
    with ExitStack() as stack:
        up = {name: stack.enter_context(maker()) for name, maker in {OURS: ours, **peers}.items()}
        for one in up.values():
            one.firsts(2, PAUSE)
        found = interleave(rounds, {name: partial(one.firsts, n, PAUSE) for name, one in up.items()})
    name = "submit -> first event at a subscriber"
    figures = [
        figure(f"{name}, {who}", "ms", [s * 1e3 for some in samples for s in some])
        for who, samples in found.items()
    ]
    medians = {who: [median(some) for some in samples] for who, samples in found.items()}
    return figures + [ratio(f"{name}, {OURS} / {who}", medians[OURS], medians[who]) for who in peers]


#: No-ops per second that ours is to reach, and how many times as many as a peer.
FRESH_GOALS = {OURS: 200.0, "RQ": 2.0}
REUSE_GOALS = {OURS: 2_000.0, "Celery": 3.0, "Huey": 1.1, "django-tasks": 15.0}


@benchmark("fresh", repetitions=5)
def run_fresh(repetitions: int) -> list[Figure]:
    """no-op runs per second, durable, a fresh process per run, beside RQ"""
    return rates("a process per run", repetitions, {}, FRESH_GOALS, FRESH_RUNS)


@benchmark("reuse", repetitions=5)
def run_reuse(repetitions: int) -> list[Figure]:
    """no-op runs per second, durable, two processes that are used again, beside peers with two"""
    return rates(f"{WORKERS} processes", repetitions, REUSED, REUSE_GOALS, REUSE_RUNS)


#: Keyword arguments of our tree: a default pool of two processes, each for any number of runs.
REUSED: Mapping[str, Any] = {"runners": WORKERS, "POOLS": {"default": {"runs": MANY}}}


def rates(
    what: str, rounds: int, tree: Mapping[str, Any], goals: Mapping[str, float], runs: Mapping[str, int]
) -> list[Figure]:
    """Measure so many rounds of no-ops submitted at once, as many by each contestant as `runs` says.

    Each has the machine for itself, and has just been at work: Huey looks for it less and less often when there is
    none, up to every 10 s. Ours last until the last end is recorded, the peers' until the last body has begun.
    """
    makers = {OURS: partial(ours, **tree), ROWS: partial(ours, app="bulkhead_rows", **tree), **PEERS}

    def fresh(who: str) -> float:
        with makers[who]() as contestant:
            return contestant.rate(runs[who])

    found = interleave(rounds, {who: partial(fresh, who) for who in runs})
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
            found[who],
            *([at_least(goals[who])] if who in goals else []),
        )
        for who in PEERS
        if who in runs
    ]
