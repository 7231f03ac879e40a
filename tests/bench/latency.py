"""How late an event comes to a subscriber when it is one of 500 a second, alone and in bad company."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx

from tests.bench.figures import Figure, at_most, figure, ratio
from tests.bench.pace import outside, watched
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave
from tests.bench.trees import BURN_SECONDS, BURNS, RUNNERS, await_idle, cancelled_at_end
from tests.helpers import ROOT, SseDecoder, SseEvent, Tree, eventually

#: Seconds between two events of the measured run, and how many it has.
PAUSE = 0.002
EVENTS = 1_500

#: Bytes of an event of the flood beside it, and more of them than a round could hold.
FLOOD_SIZE = 200
ENDLESS = 1_000_000_000

#: The tree holds the measured run and its company at the same time.
SEATS = max(RUNNERS, BURNS + 3)

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


def latencies(tree: Tree, events: int) -> list[tuple[float, float]]:
    """Have one run emit at its pace; return (Unix time of its making, seconds from there to its arrival) per event."""
    answer = tree.submit("demo.count", n=events, delay=PAUSE)
    found = decode(read_all(tree, answer["id"], answer["token"]))
    joined = found[0][0]  # what was made before the subscriber came would measure the subscriber
    made = [(at, stamp(event)) for at, event in found if event.type == "progress"]
    return [(when, at - when) for at, when in made if when > joined]


def crash_again_and_again(url: str, token: str) -> None:
    """Have one run after the other die of a segmentation fault, for ever."""
    headers = {"Authorization": f"Bearer {token}"}
    order = {"task": "demo.crash", "kwargs": {"how": "segv"}}
    with httpx.Client(base_url=url, headers=headers, timeout=_PATIENCE, trust_env=False) as client:
        while True:
            answer = client.post("/api/v1/runs", json=order).raise_for_status().json()
            client.get(f"/api/v1/runs/{answer['id']}/events", headers={"Accept": "text/event-stream"})


def _failures(tree: Tree) -> int:
    """Return how many runs have failed in this tree: only those that crash do."""
    return int(tree.http.get("/api/v1/stats").json()["runs"]["FAILED"])


@contextmanager
def crashing(tree: Tree) -> Iterator[None]:
    """Have runs crash, one after the other, while the block runs; whoever sees to it is a process of its own."""
    before = _failures(tree)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.latency", tree.url],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env=tree.environment(),
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(tree.token() + "\n")  # not on the command line, which everybody can read
        process.stdin.flush()
        try:
            eventually(lambda: _failures(tree) > before, 20.0, "a crash")
            yield
            assert process.poll() is None, "nothing crashed any more"
        finally:
            process.kill()


@contextmanager
def hostile(tree: Tree) -> Iterator[None]:
    """Have BURNS runs burn, one flood, one after the other crash, while the block runs."""
    burns = [("demo.burn", {"seconds": BURN_SECONDS})] * BURNS
    flood = ("demo.flood", {"n": ENDLESS, "size": FLOOD_SIZE})
    with cancelled_at_end(tree, [*burns, flood]), crashing(tree):
        yield


def quiet_round(tree: Tree, events: int) -> tuple[list[float], list[float]]:
    """Measure with nothing else on the machine that is ours; return (all, those while the machine kept its pace)."""
    await_idle(tree, SEATS)
    with watched() as pace:
        found = latencies(tree, events)
    return [seconds for _, seconds in found], outside(found, pace.slow())


def hostile_round(tree: Tree, events: int) -> tuple[list[float], list[float]]:
    """Measure in bad company; nobody can tell its doing from the machine's."""
    with hostile(tree):
        return [seconds for _, seconds in latencies(tree, events)], []


@benchmark("latency", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """500 events/s to one subscriber, durable: emit -> client, quiet and beside 2 burns, a flood, a crash loop"""
    return measure(repetitions, EVENTS)


def measure(rounds: int, events: int) -> list[Figure]:
    """Measure so many rounds of so many events, quiet and hostile ones in turn."""
    breaker = json.dumps({"crashes": 0})  # or the crash loop would be held back
    with Tree(settings=None, runners=SEATS, env={"TASKKIT_BREAKER": breaker}) as tree:
        latencies(tree, min(events, 200))  # connections, pages, statements: made once
        found = interleave(
            rounds,
            {"quiet": partial(quiet_round, tree, events), "hostile": partial(hostile_round, tree, events)},
        )
    name = f"emit -> client at {1 / PAUSE:.0f}/s"
    p99 = {kind: [figure(kind, "s", whole).percentile(0.99) for whole, _ in found[kind]] for kind in found}
    quiet, steady, company = (
        [sample * 1e3 for one in found[kind] for sample in one[which]]
        for kind, which in (("quiet", 0), ("quiet", 1), ("hostile", 0))
    )
    return [
        figure(f"{name}, quiet", "ms", quiet, at_most(1.0)),
        figure(
            f"{name}, quiet, while the machine keeps its pace", "ms", steady, at_most(1.0), at_most(5.0, 0.99)
        ),
        figure(f"{name}: while the machine keeps its pace", "%", [100 * len(steady) / len(quiet)]),
        figure(f"{name}, {BURNS} burns, flood, crashes", "ms", company),
        ratio("p99 of a round: hostile / quiet", p99["hostile"], p99["quiet"], at_most(3.0)),
    ]


if __name__ == "__main__":
    crash_again_and_again(sys.argv[1], sys.stdin.readline().strip())
