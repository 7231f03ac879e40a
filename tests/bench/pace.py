"""Whether the machine keeps its pace while something is measured.

A virtual machine may stand nearly still for some 50 ms, on all its processors and without counting it as stolen time:
the same few instructions take ten times as long then. Where this was written that happens for 2 % of the time, so the
99th percentile of anything at all is made of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.helpers import ROOT

#: Seconds between two probes, and how often a probe adds: 0.1 ms of work, 5 % of a core.
PAUSE: Final = 0.002
STEPS: Final = 1_500

#: So many times its median, and a probe was slow.
SLOW: Final = 3.0

#: Seconds that a slow probe counts before its beginning and after its end: what was late then has to be caught up with.
BEFORE: Final = 0.005
AFTER: Final = 0.02


@dataclass
class Pace:
    """Probes as (Unix time of the beginning, seconds it took); complete when the block of `watched` is left."""

    probes: list[tuple[float, float]] = field(default_factory=list)

    def slow(self) -> list[tuple[float, float]]:
        """Return the stretches (from, to) in which the machine did not keep its pace, in order."""
        usual = statistics.median(seconds for _, seconds in self.probes)
        found: list[tuple[float, float]] = []
        for at, seconds in self.probes:
            if seconds <= SLOW * usual:
                continue
            begin, end = at - BEFORE, at + seconds + AFTER
            if found and begin <= found[-1][1]:
                begin = found.pop()[0]
            found.append((begin, end))
        return found


def outside(samples: Sequence[tuple[float, float]], stretches: Sequence[tuple[float, float]]) -> list[float]:
    """Return the values of those samples (Unix time, value) that fall into none of the stretches."""
    return [value for at, value in samples if not any(begin <= at <= end for begin, end in stretches)]


@contextmanager
def watched() -> Iterator[Pace]:
    """Probe while the block runs, from a process of its own."""
    pace = Pace()
    command = [sys.executable, "-m", "tests.bench.pace"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        try:
            yield pace
        finally:
            told, _ = process.communicate("enough\n")
    pace.probes += [(float(at), float(seconds)) for at, seconds in map(str.split, told.splitlines())]


def _work() -> int:
    total = 0
    for step in range(STEPS):
        total += step * step
    return total


def main() -> None:
    """Probe until standard input says something; print what was found."""
    import select

    probes = []
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        at, began = time.time(), time.perf_counter()
        _work()
        probes.append((at, time.perf_counter() - began))
    for at, seconds in probes:
        print(f"{at:.6f} {seconds:.6f}")


if __name__ == "__main__":
    main()
