"""The benchmarks' command.

    python -m tests.bench [NAME...] [-n REPETITIONS] [--out FILE]   runs them, one after the other; all without a name
    python -m tests.bench --list                                    says what there is

`--out` keeps every sample, with the machine's description, as JSON.

Exit codes: 0 measured, 1 a benchmark could not be run (the others were), 2 no such benchmark. A figure that misses
its goal is a figure, no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import (
    commits,
    crowd,
    deaths,
    fanout,
    idle,
    ingest,
    latency,
    memory,
    queues,
    retention,
    scale,
    start,
    subscribers,
    together,
)
from tests.bench.figures import table
from tests.bench.registry import BENCHMARKS, Benchmark

#: Importing a module registers its benchmarks.
MODULES = (
    *(start, ingest, latency, retention, fanout, scale, subscribers, crowd, memory),
    *(commits, queues, deaths, idle, together),
)


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, their load before the run, kernel, Python."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def list_them() -> str:
    """Return the list, one line each."""
    return "\n".join(f"{one.name:<10} {one.summary} (n = {one.repetitions})" for one in BENCHMARKS.values())


def main(arguments: Sequence[str]) -> int:
    """Run the named benchmarks; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure, without judging.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure (all)")
    parser.add_argument("-n", type=int, default=0, help="repetitions instead of the usual number")
    parser.add_argument("--list", action="store_true", help="say what there is, and leave")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep every sample there, as JSON")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(sorted(BENCHMARKS))}")
    if options.list:
        print(list_them())
        return 0
    record: dict[str, Any] = {"machine": machine(), "benchmarks": {}, "failed": {}}
    for name in options.names or BENCHMARKS:
        measure(BENCHMARKS[name], options.n, record)
        if options.out is not None:  # after each: an hour's work is not lost with the last one
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    return 1 if record["failed"] else 0


def measure(chosen: Benchmark, repetitions: int, record: dict[str, Any]) -> None:
    """Run one benchmark, print it, add it to the record; one that fails is written down as such."""
    print(f"\n{chosen.name}: {chosen.summary}", flush=True)
    begun = time.monotonic()
    try:
        found = chosen.function(repetitions if repetitions > 0 else chosen.repetitions)
    except Exception as error:
        traceback.print_exc()
        record["failed"][chosen.name] = f"{type(error).__name__}: {error}"
        return
    print(table(found), flush=True)
    record["benchmarks"][chosen.name] = {
        "summary": chosen.summary,
        "seconds": round(time.monotonic() - begun, 1),
        "figures": [one.summary() for one in found],
    }


if __name__ == "__main__":
    # What is up (trees, servers, workers in sessions of their own) goes with whoever is told to leave.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
