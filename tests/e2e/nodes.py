"""Several trees on one PostgreSQL, which notes by itself what becomes of each run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg

from taskkit import tokens
from tests.chaos.world import free_port
from tests.faults import Postgres
from tests.helpers import FOLDER_PREFIX, ROOT, Tree, eventually, is_alive, processes_of

#: Seconds of a lease: four renewals a second keep it while this machine stands still for half a second.
LEASE = 3.0

#: A row for each end, each taking over, each claim: by the database's own hand, whoever writes.
_TRIGGER = """
CREATE TABLE happened (run uuid, what text, node text, at timestamptz DEFAULT clock_timestamp());
CREATE FUNCTION note() RETURNS trigger AS $$
BEGIN
    IF NEW.status NOT IN ('READY', 'RUNNING') AND (TG_OP = 'INSERT' OR OLD.status IS DISTINCT FROM NEW.status) THEN
        INSERT INTO happened VALUES (NEW.id, 'ended', NEW.node);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF OLD.status NOT IN ('READY', 'RUNNING') AND NEW.status IN ('READY', 'RUNNING') THEN
            INSERT INTO happened VALUES (NEW.id, 'revived', NEW.node);
        END IF;
        IF OLD.moves <> NEW.moves THEN
            INSERT INTO happened VALUES (NEW.id, 'put back', OLD.node);
        END IF;
        IF NEW.moves > 0 AND NEW.node <> '' AND OLD.node = '' THEN
            INSERT INTO happened VALUES (NEW.id, 'taken', NEW.node);
        END IF;
    END IF;
    RETURN NEW;
END $$ LANGUAGE plpgsql;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON taskkit_run FOR EACH ROW EXECUTE FUNCTION note();
"""

_SUBMIT = """
import json, sys
import django
django.setup()
from django.db import transaction
from taskkit import submit
for task, kwargs, count in json.loads(sys.argv[1]):
    with transaction.atomic():
        for _ in range(count):
            print(submit(task, kwargs=kwargs).id)
"""

_CHAIN = """
import django
django.setup()
from django.db import transaction
from taskkit import submit
before = []
with transaction.atomic():
    for number in range(3):
        before = [submit("proj.echo", kwargs={"value": number}, after=before).id]
        print(*before)
"""


class Nodes:
    """A database and the trees that share it; the trees have one key."""

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.key = tokens.load_or_create_key(server.folder / "key")
        self.trees: list[Tree] = []

    def tree(self, folder: Path, *, runners: int = 3, env: Mapping[str, str] = {}) -> Tree:
        """Return a tree that is not started; clients are sent to it."""
        shutil.copyfile(self.server.folder / "key", folder / "key")
        (folder / "key").chmod(0o600)
        port = free_port()
        limits = {"lease_seconds": LEASE, "cancel_grace_seconds": 1.0, "kill_grace_seconds": 0.5}
        environment = {
            **self.server.environment(),
            "TASKKIT_NODE_URL": f"http://127.0.0.1:{port}",
            "TASKKIT_LIMITS": json.dumps({**limits, "restart_delay_seconds": 0.2}),
            **env,
        }
        tree = Tree(folder, runners=runners, args=("--bind", f"127.0.0.1:{port}"), env=environment)
        self.trees.append(tree)
        return tree

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the database."""
        with psycopg.connect(f"host={self.server.folder} user=bulkhead dbname=bulkhead") as connection:
            return connection.execute(statement, values).fetchall()

    def run(self, statement: str) -> None:
        """Have the database do something."""
        with psycopg.connect(f"host={self.server.folder} user=bulkhead dbname=bulkhead") as connection:
            connection.execute(statement)

    def submit(self, *what: tuple[str, dict[str, Any], int]) -> list[str]:
        """Submit from a Django process, so many of each in a transaction; return the ids."""
        return self._python(_SUBMIT, json.dumps(what))

    def _python(self, script: str, *arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            cwd=ROOT,
            env=self.trees[0].environment() | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"},
        )
        return done.stdout.split()

    def submit_chain(self) -> list[str]:
        """Submit three runs of which each comes after the one before, in one transaction; return the ids."""
        return self._python(_CHAIN)

    def name(self, tree: Tree) -> str:
        """Return the name of a tree's node."""
        return (tree.state_dir / "node").read_text().strip()

    def column(self, name: str, run: str) -> Any:
        """Return what Django knows of a run."""
        found = self.query(f"SELECT {name} FROM taskkit_run WHERE id = %s", run)
        return found[0][0] if found else None

    def open_of(self, tree: Tree) -> int:
        """Return how many open runs a node has."""
        statement = "SELECT count(*) FROM taskkit_run WHERE node = %s AND status IN ('READY', 'RUNNING')"
        return int(self.query(statement, self.name(tree))[0][0])

    def unfinished(self) -> int:
        """Return how many runs are open."""
        return int(self.query("SELECT count(*) FROM taskkit_run WHERE status IN ('READY', 'RUNNING')")[0][0])

    def shares(self) -> Counter[str]:
        """Return how many runs each node has, ended ones included."""
        return Counter(dict(self.query("SELECT node, count(*) FROM taskkit_run GROUP BY node")))

    def check_ends(self) -> None:
        """Every run has ended, once, as the database has seen it."""
        assert self.query("SELECT * FROM happened WHERE what = 'revived'") == []
        ends = Counter(run for (run,) in self.query("SELECT run FROM happened WHERE what = 'ended'"))
        assert {run: count for run, count in ends.items() if count > 1} == {}
        assert set(ends) == {run for (run,) in self.query("SELECT id FROM taskkit_run")}
        eventually(lambda: not self.query("SELECT id FROM taskkit_outbox"), 10, "an empty outbox")


@contextmanager
def nodes() -> Iterator[Nodes]:
    """Give a database for any number of trees, which are entered by the caller."""
    with Postgres() as server:
        server.migrate()
        made = Nodes(server)
        made.run(_TRIGGER)
        yield made


@contextmanager
def folders(count: int) -> Iterator[list[Path]]:
    """Give state directories with short names."""
    with ExitStack() as stack:
        yield [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir="/tmp")))
            for _ in range(count)
        ]


def whole(tree: Tree) -> set[psutil.Process]:
    """Return every process of a tree, what tasks have started included."""
    tree.children()
    return processes_of(tree.state_dir) | tree._known | {psutil.Process(tree.pid)}


def kill_whole(tree: Tree) -> None:
    """Do what a power cut does to a machine's processes: all at once, nobody tells anybody."""
    for process in whole(tree):
        if is_alive(process):
            process.kill()
    tree.process.wait()
