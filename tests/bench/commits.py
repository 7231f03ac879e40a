"""How soon a run begins that another Django process on this machine has committed."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from tests.bench.figures import Figure, at_most, figure
from tests.bench.peers.contestants import ours
from tests.bench.registry import benchmark
from tests.bench.rounds import interleave
from tests.faults import Postgres

#: Submissions of a round, and seconds between two of them: each finds the tree idle.
COMMITS = 20
PAUSE = 0.05


@benchmark("commit", repetitions=5)
def run(repetitions: int) -> list[Figure]:
    """from a commit in a Django process to the body's first act, a fresh process per run, on SQLite and PostgreSQL"""
    return commits(repetitions, COMMITS)


def commits(rounds: int, n: int) -> list[Figure]:
    """Measure so many rounds of `n` submissions one after the other; PostgreSQL waits for its disk."""
    with ExitStack() as stack:
        server = stack.enter_context(Postgres("fsync=on"))
        server.migrate()
        up = {
            "SQLite": stack.enter_context(ours()),
            "PostgreSQL": stack.enter_context(ours(database=server.environment())),
        }
        found = interleave(rounds, {name: partial(one.commits, n, PAUSE) for name, one in up.items()})
    return [
        figure(
            f"commit -> body starts, {name}", "ms", [s * 1e3 for some in samples for s in some], at_most(10.0)
        )
        for name, samples in found.items()
    ]
