"""The benchmarks' command.

    python -m tests.bench                                     lists them
    python -m tests.bench NAME... [-n REPETITIONS] [--json]   runs them, one after the other

Exit codes: 0 measured, 2 no such benchmark. A figure that misses its goal is a figure, no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from tests.bench import crowd, events, memory, retention, start
from tests.bench.figures import Figure, table
from tests.bench.registry import BENCHMARKS

#: Importing a module registers its benchmarks.
MODULES = (start, events, retention, crowd, memory)


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
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure")
    parser.add_argument("-n", type=int, default=0, help="repetitions instead of the usual number")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(sorted(BENCHMARKS))}")
    if not options.names:
        print(list_them())
        return 0
    about = machine()
    found: dict[str, list[Figure]] = {}
    for name in options.names:
        chosen = BENCHMARKS[name]
        found[name] = chosen.function(options.n if options.n > 0 else chosen.repetitions)
        if not options.json:
            print(f"\n{name}: {chosen.summary}\n{table(found[name])}", flush=True)
    if options.json:
        figures = {name: [one.summary() for one in measured] for name, measured in found.items()}
        print(json.dumps({"machine": about, "benchmarks": figures}, indent=2))
    else:
        print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
