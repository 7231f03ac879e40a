"""The chaos run as a command.

    python -m tests.chaos [--seconds 60] [--seed N] [--rate F] [--load F] [--kinds a,b] [--json FILE] [--log FILE]

Exit codes: 0 every promise held, 1 one did not, 2 a flag is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from tests.chaos.plan import KINDS, select
from tests.chaos.run import LOAD_RATE, Options, chaos


def parse(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    """Return the options, with where to write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Break everything; check all.")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the attack")
    parser.add_argument("--seed", type=int, default=None, help="decides the whole plan; printed")
    parser.add_argument("--rate", type=float, default=2.0, help="faults a second on average")
    parser.add_argument("--load", type=float, default=LOAD_RATE, help="runs submitted a second on average")
    parser.add_argument("--kinds", default="", help="only these faults, by name or first word of it")
    parser.add_argument("--json", type=Path, default=None, help="write the report there as well")
    parser.add_argument("--log", type=Path, default=None, help="copy the tree's log there")
    given = parser.parse_args(arguments)
    try:
        kinds = select(filter(None, given.kinds.split(","))) or KINDS
    except ValueError as error:
        parser.error(str(error))
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    options = Options(
        seed=seed, seconds=given.seconds, rate=given.rate, load=given.load, kinds=kinds, keep_log=given.log
    )
    return options, given.json


def main(arguments: Sequence[str]) -> int:
    """Run, print, write; return the exit code."""
    options, path = parse(arguments)
    print(f"seed {options.seed}", flush=True)
    report = trio.run(chaos, options)
    print(report.as_text(), flush=True)
    if path is not None:
        path.write_text(json.dumps(report.as_data(), indent=2) + "\n")
    return 0 if report.verdict.sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
