"""How fast events get from a task to a subscriber, when they are many and when they are few."""

from __future__ import annotations

import datetime as dt
import time

from tests.bench.figures import Figure, figure
from tests.bench.registry import benchmark
from tests.bench.trees import BURNS, RUNNERS, await_idle, burning, demo_tree
from tests.helpers import SseDecoder, SseEvent, Tree

#: Events of one flood, and the bytes of each one's own data.
FLOOD = 20_000
FLOOD_SIZE = 100

#: Seconds between two events of a calm task: 100 a second.
CALM = 0.01

#: Calm events per repetition.
CALM_EVENTS = 100

#: Seconds for one whole stream.
_PATIENCE = 120.0


def read_all(tree: Tree, run: str, token: str) -> list[tuple[float, bytes]]:
    """Return a stream's bytes with the Unix time at which each part came.

    Nothing is parsed on the way: on a small machine the reader would take its time from the writers.
    """
    parts = []
    with tree.stream(run, token=token, timeout=_PATIENCE) as stream:
        while data := stream.read():
            parts.append((time.time(), data))
    return parts


def decode(parts: list[tuple[float, bytes]]) -> list[tuple[float, SseEvent]]:
    """Return the events of a stream with their time of arrival.

    Raises:
      AssertionError: they are not 1, 2, 3 … up to a `stream.end`: what is fast must also be right.
    """
    decoder = SseDecoder()
    found = [(at, event) for at, data in parts for event in decoder.receive(data)]
    ids = [int(event.id) for _, event in found]
    assert ids == list(range(1, len(ids) + 1)), "the stream has holes or repeats"
    assert found[-1][1].type == "stream.end"
    return found


def stamp(event: SseEvent) -> float:
    """Return the Unix time that an event says it was made at."""
    return dt.datetime.fromisoformat(event.json["_timestamp"]).timestamp()


def flood(tree: Tree, events: int) -> tuple[float, float]:
    """Have one task emit flat out; return events per second (stored, seen by one subscriber).

    Stored: from the gateway's time of `run.started` to that of `stream.end`. Seen: until the end has arrived.
    """
    await_idle(tree, RUNNERS)
    answer = tree.submit("demo.flood", n=events, size=FLOOD_SIZE)
    found = decode(read_all(tree, answer["id"], answer["token"]))
    assert len(found) == events + 2
    started, (seen, end) = stamp(found[0][1]), found[-1]
    return events / (stamp(end) - started), events / (seen - started)


def latencies(tree: Tree, events: int) -> list[float]:
    """Have one task emit 100 a second; return the seconds from each event's making to its arrival."""
    answer = tree.submit("demo.count", n=events, delay=CALM)
    found = decode(read_all(tree, answer["id"], answer["token"]))
    joined = found[0][0]  # what was made before the subscriber came would measure the subscriber
    calm = [(at, stamp(event)) for at, event in found if event.type == "progress"]
    return [at - made for at, made in calm if made > joined]


@benchmark("events", repetitions=10)
def run(repetitions: int) -> list[Figure]:
    """one task flat out: events/s stored and seen; 100 events/s: write() -> subscriber latency"""
    return measure(repetitions, FLOOD, CALM_EVENTS * repetitions)


def measure(floods: int, flood_events: int, calm_events: int) -> list[Figure]:
    """Measure with so many floods of so many events, and so many calm events, idle and under load."""
    with demo_tree() as tree:
        flood(tree, min(1000, flood_events))  # connections, pages, statements: made once
        rates = [flood(tree, flood_events) for _ in range(floods)]
        calm = latencies(tree, calm_events)
        with burning(tree):
            busy = latencies(tree, calm_events)
    name = "write() -> subscriber at 100/s"
    return [
        figure("flood: events stored", "1/s", [stored for stored, _ in rates]),
        figure("flood: events seen by one subscriber", "1/s", [seen for _, seen in rates]),
        figure(f"{name}, idle", "ms", [s * 1e3 for s in calm]),
        figure(f"{name}, {BURNS} burns", "ms", [s * 1e3 for s in busy]),
    ]
