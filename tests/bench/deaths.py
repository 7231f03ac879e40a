"""How soon a client knows that the process of its task has died, and whether it ever does."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from tests.bench.figures import Figure, at_most, figure, median, ratio
from tests.bench.peers.contestants import Contestant, Maker, ours
from tests.bench.peers.queues import OURS, PEERS
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave

#: Ways to die, taken in turn.
SIGNALS = (signal.SIGKILL, signal.SIGSEGV)

#: Deaths of a round.
DEATHS = 12

#: Seconds until a client is believed that it would never know.
PATIENCE = 60.0

#: Those whose clients know, and those whose clients wait for as long as they like.
TOLD = ("RQ", "Celery")
UNTOLD = ("Huey", "django-tasks", "Procrastinate", "Dramatiq")


@benchmark("deaths", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """from the death of a task's process (SIGKILL, segmentation fault) to the end at its client, beside peers"""
    return measure(repetitions, DEATHS, TOLD, UNTOLD)


def measure(rounds: int, n: int, told: Sequence[str], untold: Sequence[str]) -> list[Figure]:
    """Measure so many rounds of `n` deaths one after the other; the untold ones once.

    The tests' project holds no task back for crashing, which this one is there for.
    """
    makers: Mapping[str, Maker] = {OURS: ours} | {name: PEERS[name] for name in told}
    with ExitStack() as stack:
        up = {name: stack.enter_context(maker()) for name, maker in makers.items()}
        found = interleave(rounds, {name: partial(deaths, one, n) for name, one in up.items()})
    name = "death of its process -> end at the client"
    figures = [
        figure(
            f"{name}, {who}",
            "ms",
            [s * 1e3 for some in samples for s in some],
            *([at_most(25.0), at_most(100.0, 0.99)] if who == OURS else []),
        )
        for who, samples in found.items()
    ]
    medians = {who: [median(some) for some in samples] for who, samples in found.items()}
    figures += [ratio(f"{name}, {OURS} / {who}", medians[OURS], medians[who]) for who in told]
    with ThreadPoolExecutor(
        max(1, len(untold))
    ) as pool:  # they wait side by side: nothing is measured but patience
        waits = list(pool.map(wait, untold))
    return figures + [
        figure(f"{name}, {who}{'' if seconds < PATIENCE else ' (never within)'}", "ms", [seconds * 1e3])
        for who, seconds in zip(untold, waits, strict=True)
    ]


def wait(name: str) -> float:
    """Return the seconds from one death until a peer's client knows, at most PATIENCE."""
    with PEERS[name]() as contestant:
        seconds = contestant.death(signal.SIGKILL, PATIENCE)
    return PATIENCE if seconds is None else seconds


def deaths(contestant: Contestant, n: int) -> list[float]:
    """Return the seconds of `n` deaths.

    Raises:
      AssertionError: the client was never told.
    """
    found = [contestant.death(SIGNALS[number % len(SIGNALS)], PATIENCE) for number in range(n)]
    assert None not in found, f"after {PATIENCE:.0f} s the client does not know"
    return [seconds for seconds in found if seconds is not None]
