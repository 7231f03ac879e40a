"""What a subscriber costs who only comes, and stays."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.contestants import Contestant, bulkhead
from tests.bench.contests import NCHAN, OURS, PEERS, STARLETTE, contestants, one_round
from tests.bench.figures import Figure, at_least, at_most, figure, ratio
from tests.bench.readers import raise_descriptors, reading
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave
from tests.bench.usage import come_to_rest, memory

#: Idle subscribers whose memory is counted.
IDLE = 1_000

#: Connections that come at once, beside how many streams of 50 events/s.
STORM = 2_000
OPEN = 200
EVENTS = 100
DELAY = 0.02

#: Of connections a second: twice what the prototype took.
ENOUGH = 2 * 850


@dataclass(frozen=True, slots=True)
class Storm:
    """Connections taken per second; the p99 of streams that were open before, in seconds, without and with it."""

    rate: float
    quiet: float
    stormy: float


@benchmark("resting", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """1,000 subscribers to whom nothing is said, beside four peers: memory of each"""
    return measure(repetitions, IDLE, tuple(PEERS))


def measure(repetitions: int, count: int, peers: Sequence[str]) -> list[Figure]:
    """Measure so many rounds, a fresh server each time: what was given back would not be asked for again."""
    raise_descriptors()
    turns = {name: functools.partial(_size, name, count) for name in (OURS, *peers)}
    found = interleave(repetitions, turns)
    figures = [
        figure(
            f"{name}: memory per subscriber",
            "KB",
            [size / 1e3 for size in sizes],
            *([at_most(18.0)] if name == OURS else []),
        )
        for name, sizes in found.items()
    ]
    if STARLETTE in found:
        figures.append(ratio(f"ours / {STARLETTE}", found[OURS], found[STARLETTE], at_most(0.45)))
    return figures


def _size(name: str, count: int) -> float:
    """Return the bytes by which a server grew with each subscriber: PSS of its processes, without the kernel's part."""
    with bulkhead() if name == OURS else PEERS[name]() as contestant:
        one_round(contestant, 20, 20, DELAY)
        with contestant.channel(1, DELAY) as channel:
            pids = contestant.pids()
            come_to_rest(pids)
            before = memory(pids)
            with reading(channel.target, count, 0):
                come_to_rest(pids)
                grown = (memory(pids) - before) / count
    print(f"  {name}: {grown / 1e3:.1f} KB", file=sys.stderr, flush=True)
    return grown


@benchmark("joining", repetitions=5)
def run_joining(repetitions: int) -> list[Figure]:
    """2,000 connections at once beside 200 open streams, beside two peers: how many per second, who is disturbed"""
    return measure_joining(repetitions, STORM, OPEN, (NCHAN, STARLETTE))


def measure_joining(repetitions: int, storm: int, open_streams: int, peers: Sequence[str]) -> list[Figure]:
    """Measure so many rounds of so many connections beside so many streams."""
    with contestants(peers) as running:
        turns = {
            name: functools.partial(_storm, contestant, storm, open_streams)
            for name, contestant in running.items()
        }
        found = interleave(repetitions, turns)
    figures = []
    for name, rounds in found.items():
        goals = [at_least(ENOUGH)] if name == OURS else []
        figures += [
            figure(f"{name}: connections", "1/s", [one.rate for one in rounds], *goals),
            figure(f"{name}: p99 of open streams, quiet", "ms", [one.quiet * 1e3 for one in rounds]),
            figure(f"{name}: the same beside the storm", "ms", [one.stormy * 1e3 for one in rounds]),
        ]
    return figures


def _storm(contestant: Contestant, count: int, open_streams: int) -> Storm:
    quiet = one_round(contestant, open_streams, EVENTS, DELAY).p99
    with (
        contestant.channel(EVENTS, DELAY) as live,
        contestant.channel(1, DELAY) as silent,
        reading(live.target, open_streams, EVENTS) as readers,
    ):
        come_to_rest(contestant.pids())
        live.begin()
        with reading(silent.target, count, 0) as storm:
            heard = readers.heard()
    assert not heard.missing, f"{contestant.name} lost something: {heard}"
    found = Storm(storm.rate, quiet, heard.p99)
    print(f"  {contestant.name}: {found}", file=sys.stderr, flush=True)
    return found
