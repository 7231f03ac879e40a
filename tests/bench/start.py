"""How long a run waits before it runs, with what the processes that make this short cost in memory."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, field
from typing import Any

from tests.bench import births
from tests.bench.figures import Figure, Goal, at_most, figure
from tests.bench.registry import benchmark
from tests.bench.trees import BURNS, RUNNERS, await_idle, burning, demo_tree
from tests.helpers import Tree

MIB = 1024 * 1024

#: Processes there is one of; gateway, supervisor and courier are not dumpable, so only root sees their memory.
INFRASTRUCTURE = ("gateway", "zygote", "courier")


@dataclass(slots=True)
class Starts:
    """Samples of runs started one after the other, in seconds.

    Attributes:
      accepted: POST to 202.
      seen: POST to `run.started` at a subscriber that connects when it has the 202.
      stored: `created_at` to the time of `run.started`, both the gateway's.
    """

    accepted: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)


def start_one(tree: Tree, starts: Starts) -> str:
    """Submit one run on a kept-alive connection, follow it until it has started; return its id."""
    begun = time.monotonic()
    answer: dict[str, Any] = tree.submit("demo.count", n=1, delay=0.0)
    starts.accepted.append(time.monotonic() - begun)
    with tree.stream(answer["id"], token=answer["token"]) as stream:
        started = next(event for event in stream.events() if event.type == "run.started")
    starts.seen.append(started.at - begun)
    return str(answer["id"])


def start_many(tree: Tree, repetitions: int, idle: int) -> Starts:
    """Start runs one after the other, each when the pool has `idle` fresh processes again."""
    starts = Starts()
    runs = []
    for _ in range(repetitions):
        await_idle(tree, idle)
        runs.append(start_one(tree, starts))
        tree.wait(runs[-1])
    starts.stored = stored_delays(tree, runs)
    return starts


def stored_delays(tree: Tree, runs: list[str]) -> list[float]:
    """Return `created_at` to `run.started` as the store has them: the API rounds to milliseconds."""
    connection = sqlite3.connect(f"file:{tree.state_dir}/store.sqlite3?mode=ro", uri=True)
    try:
        query = (
            "SELECT event.at - run.created_at FROM run JOIN event ON event.run = run.no"
            " WHERE run.id = ? AND event.type = 'run.started'"
        )
        return [connection.execute(query, (run,)).fetchone()[0] for run in runs]
    finally:
        connection.close()


def memory(tree: Tree) -> list[Figure]:
    """Return the private memory of the tree's idle processes, as far as it may be read."""
    await_idle(tree, RUNNERS)
    children = tree.status().children
    idle = [child.pid for child in children if child.kind.startswith("runner")]
    named = [(name, [child.pid for child in children if child.kind == name]) for name in INFRASTRUCTURE]
    groups = [("idle runner", idle), ("supervisor", [tree.pid]), *named]
    found = []
    for name, pids in groups:
        sizes = [size / MIB for pid in pids if (size := births.private_memory(pid)) is not None]
        if sizes:
            goals = [at_most(6.0)] if name == "idle runner" else []
            found.append(figure(f"private memory of {name} (USS)", "MiB", sizes, *goals))
    return found


def figures_of(starts: Starts, where: str, *goals: Goal) -> list[Figure]:
    """Return what is printed of a series, in ms."""

    def ms(name: str, samples: list[float], *goals: Goal) -> Figure:
        return figure(f"{name}, {where}", "ms", [s * 1e3 for s in samples], *goals)

    return [
        ms("submit -> 202", starts.accepted),
        ms("submit -> run.started at a subscriber", starts.seen, *goals),
        ms("created_at -> run.started in the store", starts.stored),
    ]


@benchmark("start", repetitions=100)
def run(repetitions: int) -> list[Figure]:
    """fork -> first byte, submit -> run.started with a fresh process per run, private memory"""
    found = births.run(repetitions)
    with demo_tree() as tree:
        found += memory(tree)
        start_many(tree, 2, RUNNERS)  # connections, pages, statements: made once
        starts = start_many(tree, repetitions, RUNNERS)
        found += figures_of(starts, "idle", at_most(12.0), at_most(25.0, 0.95))
        with burning(tree):
            found += figures_of(start_many(tree, repetitions, RUNNERS - BURNS), f"{BURNS} burns")
    return found
