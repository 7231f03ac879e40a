"""Servers that take turns at the same crowd.

All of them run the whole time; those whose turn it is not cost nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.bench.contestants import Bulkhead, Contestant, bulkhead
from tests.bench.figures import Figure, Goal, figure, ratio
from tests.bench.peers.django_eventstream import django_eventstream
from tests.bench.peers.hypercorn_asgi import hypercorn_asgi
from tests.bench.peers.nchan import nchan
from tests.bench.peers.servers import Start
from tests.bench.peers.sse_starlette import sse_starlette
from tests.bench.readers import Heard, raise_descriptors, reading
from tests.bench.rounds import interleave
from tests.bench.usage import come_to_rest, cpu_seconds

OURS = Bulkhead.name
NCHAN, STARLETTE = "nchan", "sse-starlette"
EVENTSTREAM, HYPERCORN = "django-eventstream", "hypercorn ASGI send"

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

    @property
    def p50(self) -> float:
        """Seconds from the making of an event to its arrival."""
        return self.heard.p50

    @property
    def p99(self) -> float:
        """Seconds from the making of an event to its arrival."""
        return self.heard.p99


Found = Mapping[str, Sequence[Round]]


@contextmanager
def contestants(peers: Sequence[str]) -> Iterator[dict[str, Contestant]]:
    """Have ours and these peers run, warm."""
    raise_descriptors()
    with ExitStack() as stack:
        found: dict[str, Contestant] = {OURS: stack.enter_context(bulkhead())}
        for name in peers:
            found[name] = stack.enter_context(PEERS[name]())
        for contestant in found.values():
            one_round(contestant, 20, 20, 0.02)
        yield found


def one_round(contestant: Contestant, count: int, events: int, delay: float) -> Round:
    """Have one speaker speak to a crowd; it begins when all have come, and who came before has been seen off."""
    with contestant.channel(events, delay) as channel, reading(channel.target, count, events) as readers:
        pids = contestant.pids()
        come_to_rest(pids)
        before = cpu_seconds(pids)
        channel.begin()
        heard = readers.heard()
        spent = cpu_seconds(pids) - before
    assert not heard.extra, f"{contestant.name} delivered something twice: {heard}"
    assert not (heard.missing and contestant.name == OURS), f"ours lost something: {heard}"
    cost = spent / heard.deliveries
    print(
        f"  {contestant.name}, {count} x {events}: {cost * 1e6:.1f} us, {heard.deliveries / heard.seconds:,.0f}/s, "
        f"{heard.p50 * 1e3:.1f}, {heard.p99 * 1e3:.1f} ms, missing {heard.missing}, "
        f"reader {heard.busy / heard.seconds:.0%}",
        file=sys.stderr,
        flush=True,
    )
    return Round(heard, spent)


def compete(
    running: Mapping[str, Contestant], rounds: int, count: int, events: Callable[[str], int], delay: float
) -> dict[str, list[Round]]:
    """Have everybody serve the same crowd once a round, each so many events as `events` says of its name."""
    turns = {
        name: functools.partial(one_round, contestant, count, events(name), delay)
        for name, contestant in running.items()
    }
    return interleave(rounds, turns)


def plain(what: str, unit: str, attribute: str, found: Found, factor: float = 1.0) -> list[Figure]:
    """Return an attribute of the rounds, a figure per contestant."""
    return [
        figure(f"{name}: {what}", unit, [getattr(one, attribute) * factor for one in rounds])
        for name, rounds in found.items()
    ]


def against(what: str, attribute: str, found: Found, goals: Mapping[str, Goal | None]) -> list[Figure]:
    """Return ours in parts of each of these peers, of those that took part."""
    ours = [getattr(one, attribute) for one in found[OURS]]
    return [
        ratio(
            f"{what}, ours / {name}",
            ours,
            [getattr(one, attribute) for one in found[name]],
            *([goal] if goal else []),
        )
        for name, goal in goals.items()
        if name in found
    ]


def losses(found: Found) -> list[Figure]:
    """Return a figure for each contestant that did not deliver everything."""
    lost = {
        name: [one.heard.missing / (one.heard.missing + one.heard.deliveries) * 100 for one in rounds]
        for name, rounds in found.items()
    }
    return [figure(f"{name}: not delivered", "%", shares) for name, shares in lost.items() if any(shares)]
