"""One speaker, a thousand subscribers: what a delivery costs and how late it is, ours beside other servers.

All contestants run the whole time and take turns; those who are not asked cost nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.bench.contestants import Bulkhead, Contestant, bulkhead
from tests.bench.figures import Figure, Goal, at_most, figure, ratio
from tests.bench.peers.django_eventstream import django_eventstream
from tests.bench.peers.hypercorn_asgi import hypercorn_asgi
from tests.bench.peers.nchan import nchan
from tests.bench.peers.servers import Start
from tests.bench.peers.sse_starlette import sse_starlette
from tests.bench.readers import Heard, raise_descriptors, reading
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave
from tests.bench.usage import come_to_rest, cpu_seconds

#: Subscribers; events of a round, seconds between two of them: 50 a second, as a busy progress bar.
CROWD = 1_000
EVENTS = 100
DELAY = 0.02

OURS = Bulkhead.name
NCHAN, STARLETTE, EVENTSTREAM, HYPERCORN = (
    "nchan",
    "sse-starlette",
    "django-eventstream",
    "hypercorn ASGI send",
)

PEERS: Mapping[str, Start] = {
    NCHAN: nchan,
    STARLETTE: sse_starlette,
    EVENTSTREAM: django_eventstream,
    HYPERCORN: hypercorn_asgi,
}


@dataclass(frozen=True, slots=True)
class Round:
    """What one crowd heard of one speaker, and the CPU seconds that the serving processes took for it."""

    heard: Heard
    cpu: float

    @property
    def cost(self) -> float:
        """Seconds of CPU per delivery."""
        return self.cpu / self.heard.deliveries

    @property
    def rate(self) -> float:
        """Deliveries per second."""
        return self.heard.deliveries / self.heard.seconds


@contextmanager
def contestants(peers: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """Have ours and so many peers run, all warm."""
    raise_descriptors()
    with ExitStack() as stack:
        found: dict[str, Contestant] = {OURS: stack.enter_context(bulkhead())}
        for name in peers:
            found[name] = stack.enter_context(PEERS[name]())
        for contestant in found.values():
            one_round(contestant, 20, 20, DELAY)
        yield found


def one_round(contestant: Contestant, count: int, events: int, delay: float) -> Round:
    """Have one speaker speak to a crowd; who came last has been seen off before, so that it is not charged for it."""
    with contestant.channel(events, delay) as channel, reading(channel.target, count, events) as readers:
        pids = contestant.pids()
        come_to_rest(pids)
        before = cpu_seconds(pids)
        channel.begin()
        heard = readers.heard()
        spent = cpu_seconds(pids) - before
    print(
        f"  {contestant.name}: {spent / heard.deliveries * 1e6:.1f} us, {heard}", file=sys.stderr, flush=True
    )
    return Round(heard, spent)


def compete(
    running: Mapping[str, Contestant], rounds: int, count: int, events: int, delay: float
) -> dict[str, list[Round]]:
    """Have everybody serve the same crowd once a round."""
    return interleave(
        rounds,
        {
            name: functools.partial(one_round, contestant, count, events, delay)
            for name, contestant in running.items()
        },
    )


def missing(found: Mapping[str, list[Round]]) -> list[Figure]:
    """Return a figure for each contestant that lost something; nobody may get what is not theirs.

    Raises:
      AssertionError: ours lost something, or somebody got more than there was.
    """
    figures = []
    for name, rounds in found.items():
        lost = [one.heard.missing / (one.heard.missing + one.heard.deliveries) * 100 for one in rounds]
        assert not any(one.heard.extra for one in rounds), f"{name} delivered something twice"
        if any(lost):
            assert name != OURS, f"ours has lost events: {rounds}"
            figures.append(figure(f"{name}: not delivered", "%", lost))
    return figures


@benchmark("fanout", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """1,000 subscribers at 50 events/s beside four peers: CPU per delivery, latency"""
    return measure(repetitions, CROWD, EVENTS, tuple(PEERS))


def measure(repetitions: int, crowd: int, events: int, peers: Sequence[str]) -> list[Figure]:
    """Measure so many rounds with so many subscribers and events, beside these peers."""
    with contestants(peers) as running:
        found = compete(running, repetitions, crowd, events, DELAY)
    figures = []
    for name, rounds in found.items():
        figures += [
            figure(f"{name}: CPU per delivery", "us", [one.cost * 1e6 for one in rounds]),
            figure(f"{name}: p50", "ms", [one.heard.p50 * 1e3 for one in rounds]),
            figure(f"{name}: p99", "ms", [one.heard.p99 * 1e3 for one in rounds]),
        ]
    goals = {NCHAN: (at_most(1.2),), STARLETTE: (at_most(1 / 7),), EVENTSTREAM: (at_most(1 / 15),)}
    for name in peers:
        figures.append(_ratio("CPU per delivery", "cost", found, name, *goals.get(name, ())))
    if NCHAN in found:
        figures.append(_late("p50", found, at_most(0.6)))
        figures.append(_late("p99", found, at_most(0.8)))
    return figures + missing(found)


def _ratio(what: str, attribute: str, found: Mapping[str, list[Round]], peer: str, *goals: Goal) -> Figure:
    ours, theirs = ([getattr(one, attribute) for one in found[name]] for name in (OURS, peer))
    return ratio(f"{what}, ours / {peer}", ours, theirs, *goals)


def _late(what: str, found: Mapping[str, list[Round]], *goals: Goal) -> Figure:
    ours, theirs = ([getattr(one.heard, what) for one in found[name]] for name in (OURS, NCHAN))
    return ratio(f"{what}, ours / {NCHAN}", ours, theirs, *goals)
