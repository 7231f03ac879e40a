"""Many runs at the same time: thousands that share a process, a hundred that speak at once."""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.bench.figures import Figure, at_most, figure, ratio
from tests.bench.peers.contestants import folder
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave
from tests.helpers import Tree, eventually

MIB = 1024 * 1024

#: Runs that share one process, and the seconds that each one's body takes.
SHARED = 5_000
SECONDS = 1.0

#: Events that a run of these has at least: its start, three of its own, its end.
EVENTS = 5

#: Items of one batch.
BATCH = 1_000

#: How many runs speak at once; the events that they have together, and the bytes of each one's data.
SPEAKERS = (1, 10, 100)
SPOKEN = 20_000
SIZE = 100

#: Runs that one process performs until it is replaced: more than there are.
MANY = 1_000_000

_PATIENCE = 120.0


def submit(tree: Tree, task: str, count: int, pool: str = "default", /, **kwargs: Any) -> list[str]:
    """Submit so many runs to a pool by the batch endpoint; return their ids."""
    found = []
    for first in range(0, count, BATCH):
        runs = [{"task": task, "kwargs": kwargs, "pool": pool}] * min(BATCH, count - first)
        answer = tree.http.post("/api/v1/runs/batch", json={"runs": runs}, timeout=_PATIENCE)
        assert answer.json()["accepted"] == len(runs), answer.text[:1000]
        found += [one["id"] for one in answer.json()["runs"]]
    return found


@contextmanager
def store(tree: Tree) -> Iterator[sqlite3.Connection]:
    """Give the store, to be read."""
    path = f"file:{tree.state_dir}/store.sqlite3?mode=ro"
    with closing(sqlite3.connect(path, uri=True, timeout=10)) as connection:
        yield connection


def await_ends(connection: sqlite3.Connection, count: int) -> float:
    """Wait until so many runs have ended; return the Unix time at which the last one did.

    Raises:
      AssertionError: one did not succeed.
    """
    query = (
        "SELECT count(*), max(finished_at), sum(status = 'SUCCESSFUL') FROM run WHERE finished_at IS NOT NULL"
    )
    end = time.monotonic() + _PATIENCE
    while (found := connection.execute(query).fetchone())[0] < count:
        assert time.monotonic() < end, f"{found[0]} of {count} runs have ended"
        time.sleep(0.2)
    assert found[2] == count, f"{found[2]} of {count} runs were successful"
    return float(found[1])


def most_memory(process: psutil.Process) -> int:
    """Return the largest resident size that a process has had, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@dataclass(frozen=True, slots=True)
class Crowd:
    """What thousands of runs in one process took: seconds; bytes, at the worst."""

    seconds: float
    runner: int
    gateway: int


def crowd(count: int) -> Crowd:
    """Perform so many asynchronous runs in one process of a fresh tree."""
    pools = {"shared": {"runners": count, "concurrency": count, "runs": MANY}}
    with Tree(runners=1, env={"TASKKIT_POOLS": json.dumps(pools)}) as tree:
        (runner,) = [
            psutil.Process(one["pid"])
            for one in tree.http.get("/api/v1/runners").json()["runners"]
            if one["pool"] == "shared"
        ]
        gateway = psutil.Process(tree.child("gateway").pid)
        began = time.time()
        submit(tree, "proj.bench_pulse", count, "shared", seconds=SECONDS)
        with store(tree) as connection:
            ended = await_ends(connection, count)
            spoken = connection.execute("SELECT count(*) FROM event").fetchone()[0]
        assert spoken == EVENTS * count
        return Crowd(ended - began, most_memory(runner), most_memory(gateway))


@benchmark("async", repetitions=5)
def run_crowd(repetitions: int) -> list[Figure]:
    """5,000 asynchronous runs at once in one process, 1 s and 3 events each"""
    return measure_crowd(repetitions, SHARED)


def measure_crowd(rounds: int, count: int) -> list[Figure]:
    """Measure so many rounds, each on a fresh tree."""
    found = [crowd(count) for _ in range(rounds)]
    name = f"{count} async runs in one process"
    return [
        figure(f"{name}: first submission -> last end", "s", [one.seconds for one in found], at_most(10.0)),
        figure(f"{name}: most memory of that process (RSS)", "MiB", [one.runner / MIB for one in found]),
        figure(f"{name}: most memory of the gateway (RSS)", "MiB", [one.gateway / MIB for one in found]),
    ]


def usage(tree: Tree) -> float:
    """Return the seconds of CPU that the tree's infrastructure has taken: all but the runners."""
    pids = [tree.pid, *(child.pid for child in tree.status().children if not child.kind.startswith("runner"))]
    return sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))


def speak(tree: Tree, gate: Path, speakers: int, events: int) -> float:
    """Have so many runs speak at once, `events` altogether; return the seconds of CPU per event, of all processes.

    The runs are under way and wait when the clock begins, so that no start is counted, and end within it.
    """
    with gate.open("wb") as closed, store(tree) as connection:
        fcntl.flock(closed, fcntl.LOCK_EX)
        before = connection.execute("SELECT count(*) FROM run").fetchone()[0]
        each = events // speakers
        runs = submit(tree, "proj.bench_speak", speakers, n=each, size=SIZE, gate=str(gate))
        ready = (
            "SELECT count(*) FROM event JOIN run ON run.no = event.run WHERE run.no > ? AND type = 'ready'"
        )
        eventually(lambda: connection.execute(ready, (before,)).fetchone()[0] == speakers, 60, "speakers")
        began = usage(tree)
        fcntl.flock(closed, fcntl.LOCK_UN)
        await_ends(connection, before + speakers)
        spent = usage(tree) - began
    spent += sum(float(tree.snapshot(run)["result"]) for run in runs)
    return spent / (each * speakers)


@benchmark("speakers", repetitions=5)
def run_speakers(repetitions: int) -> list[Figure]:
    """CPU of all our processes per event, of 1, 10 and 100 runs that speak at once"""
    return measure_speakers(repetitions, SPEAKERS, SPOKEN)


def measure_speakers(rounds: int, speakers: Sequence[int], events: int) -> list[Figure]:
    """Measure so many rounds with so many events, on one tree."""
    with folder() as path, Tree(runners=max(speakers)) as tree:
        gate = path / "gate"
        speak(tree, gate, 1, min(events, 1_000))
        found = interleave(rounds, {str(n): partial(speak, tree, gate, n, events) for n in speakers})
    first = str(speakers[0])
    figures = [figure(f"CPU per event, runs at once: {n}", "us", [s * 1e6 for s in found[n]]) for n in found]
    return figures + [
        ratio(f"CPU per event, {n} / {first}", found[n], found[first]) for n in found if n != first
    ]
