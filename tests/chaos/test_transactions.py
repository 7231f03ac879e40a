"""Rolled back never runs, committed always does: random transactions while processes are killed.

300 of them on each database in every run of the tests; BULKHEAD_TRANSACTIONS=1000 takes a minute on each.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults import Postgres
from tests.helpers import ROOT, Tree, eventually

#: Transactions; submitters beside each other, half of which are killed somewhere in their share and replaced.
TRANSACTIONS = int(os.environ.get("BULKHEAD_TRANSACTIONS", "300"))
SUBMITTERS = 2
SHARE = 50

#: Seconds between two kills of a process of the tree, and who is killed.
PAUSE = 0.4
VICTIMS = ("gateway", "courier", "runner", "zygote")

#: Seconds for all that was committed to have ended. 550 runs, each in a process of its own.
PATIENCE = 120.0


@pytest.fixture(params=["sqlite", "postgresql"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    """Give a tree on either database; `notes` is where runs note that they have begun."""
    environment = {"BULKHEAD_CHAOS_NOTES": str(tmp_path / "notes")}
    with ExitStack() as stack:
        if request.param == "postgresql":
            server = stack.enter_context(Postgres())
            server.migrate()
            environment |= server.environment()
        # The gateway may die as often as it is killed here.
        limits = '{"gateway_restarts": 1000, "restart_delay_seconds": 0.1, "queued_runs": 100000}'
        yield stack.enter_context(Tree(env={**environment, "TASKKIT_LIMITS": limits}))


def environment(tree: Tree) -> dict[str, str]:
    return tree.environment() | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"}


def rows(tree: Tree, query: str) -> list[str]:
    """Return the first column of a query, as Django's process of this tree sees it."""
    script = (
        "import django; django.setup()\nfrom django.db import connection\n"
        "with connection.cursor() as cursor:\n"
        f"    cursor.execute({query!r})\n    print(*[row[0] for row in cursor.fetchall()], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment(tree),
    )
    return done.stdout.split()


@contextmanager
def submitter(tree: Tree, seed: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.transactions", str(seed), str(SHARE)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(tree),
    )
    try:
        yield process
    finally:
        process.kill()
        with process:
            pass


def submit_all(tree: Tree, rng: random.Random) -> tuple[list[str], Counter[str]]:
    """Have all transactions made, with kills in between; return every id that was submitted, and who was killed."""
    submitted: list[str] = []
    killed: Counter[str] = Counter()
    for _ in range(TRANSACTIONS // (SUBMITTERS * SHARE)):
        with ExitStack() as stack:
            pair = [stack.enter_context(submitter(tree, rng.randrange(2**32))) for _ in range(SUBMITTERS)]
            dies = rng.random() < 0.5
            while any(process.poll() is None for process in pair):
                time.sleep(rng.uniform(0.5, 1.5) * PAUSE)
                victim = rng.choice(VICTIMS)
                killed[victim] += kill(tree, victim, rng)
                if dies and rng.random() < 0.3:
                    rng.choice(pair).kill()
                    killed["submitter"] += 1
            submitted += [id for process in pair for id in process.communicate()[0].split()]
    return submitted, killed


def kill(tree: Tree, kind: str, rng: random.Random) -> bool:
    """Send KILL to a child of the tree of this kind, if there is one just now."""
    try:
        found = [child.pid for child in tree.status().children if child.kind.startswith(kind) and child.pid]
        os.kill(rng.choice(found), signal.SIGKILL)
    except (IndexError, ProcessLookupError, psutil.Error):
        return False
    return True


def test_rolled_back_never_runs_and_committed_always_does(
    tree: Tree, rng: random.Random, tmp_path: Path
) -> None:
    submitted, killed = submit_all(tree, rng)
    committed = set(rows(tree, "SELECT message FROM proj_row"))
    print(f"{len(submitted)} submissions, {len(committed)} committed; killed: {dict(killed)}")
    assert len(submitted) >= TRANSACTIONS * 0.5
    assert 0.3 < len(committed) / len(submitted) < 0.8, "some of each kind"
    assert committed <= set(submitted)
    eventually(lambda: not rows(tree, "SELECT id FROM taskkit_outbox"), PATIENCE, "an empty outbox")
    open_runs = "SELECT id FROM taskkit_run WHERE status IN ('READY', 'RUNNING')"
    eventually(lambda: not rows(tree, open_runs), PATIENCE, "no open run")
    ended = rows(tree, "SELECT id FROM taskkit_run WHERE status = 'SUCCESSFUL'")
    # A runner that is killed has crashed: after three attempts its run has failed, and has run.
    failed = rows(tree, "SELECT id FROM taskkit_run WHERE status = 'FAILED'")
    assert {str(uuid.UUID(id)) for id in [*ended, *failed]} == committed
    begun = {line.split()[0] for line in (tmp_path / "notes").read_text().splitlines()}
    assert begun <= committed, "what was rolled back has never begun"
    assert committed - begun <= {str(uuid.UUID(id)) for id in failed}
    assert len(failed) <= killed["runner"], "and only what was killed three times has failed"
