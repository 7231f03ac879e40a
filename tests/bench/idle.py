"""What a queue that has nothing to do takes of the machine."""

from __future__ import annotations

import compileall
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from tests.bench.figures import Figure, at_most, figure, ratio
from tests.bench.peers.contestants import Contestant, Maker, ours
from tests.bench.peers.queues import OURS, PEERS
from tests.bench.registry import benchmark
from tests.helpers import ROOT

KIB = 1024
MIB = 1024 * KIB

#: Seconds of one look at the CPU, and the kernel's unit of it.
SECONDS = 20.0
TICK = 0.01

#: Seconds for what the last run has left to be put in order.
SETTLE = 2.0


#: Compiled ahead, as pip does with what it installs, the peer included: compiling leaves holes of 3 MiB in memory.
PACKAGES = ("supervisor", "gateway", "taskkit")


@dataclass(frozen=True, slots=True)
class Look:
    """What the processes of a contestant took together.

    Attributes:
      processes: how many there are.
      shares: bytes, each page divided by those who have it (PSS).
      private: bytes that only one of them has (USS).
      cpu: seconds since they began.
    """

    processes: int
    shares: int
    private: int
    cpu: float


def look(contestant: Contestant) -> Look:
    """Look at what performs a contestant's bodies; servers such as Redis are not its own.

    Raises:
      PermissionError: some are not dumpable, and this is not root.
    """
    top = [psutil.Process(pid) for pid in contestant.workers]
    processes = [one for parent in top for one in (parent, *parent.children(recursive=True))]
    shares = private = 0
    for process in processes:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {
            name: int(size.split()[0]) * KIB for name, _, size in (line.partition(":") for line in lines)
        }
        shares += sizes["Pss"]
        private += sizes["Private_Clean"] + sizes["Private_Dirty"]
    times = [process.cpu_times() for process in processes]
    return Look(len(processes), shares, private, sum(one.user + one.system for one in times))


@benchmark("idle", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """memory and CPU of an idle tree with 4 runners, beside Celery with 2 processes and the same project"""
    for package in (*PACKAGES, "tests"):
        compileall.compile_dir(ROOT / package, quiet=2)
    return measure(repetitions, SECONDS, ["Celery"])


def measure(rounds: int, seconds: float, peers: Sequence[str]) -> list[Figure]:
    """Look so many times, for so many seconds, at all at once: they are idle, and each has its own account."""
    makers: Mapping[str, Maker] = {OURS: ours} | {name: PEERS[name] for name in peers}
    looks: list[dict[str, Look]] = []
    with ExitStack() as stack:
        up = {name: stack.enter_context(maker()) for name, maker in makers.items()}
        for _ in range(rounds + 1):
            time.sleep(seconds if looks else SETTLE)
            looks.append({name: look(one) for name, one in up.items()})
    figures = []
    for who in makers:
        found = [one[who] for one in looks]
        spent = [max(b.cpu - a.cpu, TICK) / seconds for a, b in pairwise(found)]
        name = f"idle, {who}, {found[-1].processes} processes"
        figures += [
            figure(f"{name}: memory (PSS)", "MiB", [one.shares / MIB for one in found[1:]]),
            figure(f"{name}: private memory (USS)", "MiB", [one.private / MIB for one in found[1:]]),
            figure(
                f"{name}: of a core", "%", [s * 100 for s in spent], *([at_most(1.0)] if who == OURS else [])
            ),
        ]
    for who in peers:
        mine, theirs = ([one[name].shares for one in looks[1:]] for name in (OURS, who))
        figures.append(ratio(f"idle, {OURS} / {who}: memory (PSS)", mine, theirs, at_most(1.0)))
    return figures
