"""A contestant in the races of queues: its processes, and the one that submits to them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Self

from tests.bench.trees import RUNNERS
from tests.helpers import FOLDER_PREFIX, ROOT, Tree, eventually

APPS = "tests.bench.peers.apps"

#: Bodies before anything is measured: connections, statements, pages are made once.
WARM_UP = 6

#: Seconds for a contestant's process to leave when it is asked to.
GRACE = 10.0


class Contestant:
    """A queue that is up, seen through its submitter: a process of its own that runs `apps/driver.py`.

    Args:
      python: the interpreter of its environment.
      app: the module in `apps` that submits.
      environment: over this process's own.
      folder: for its log and for the files that bodies stamp.
      workers: pids of the processes at the top of what performs the bodies.
    """

    def __init__(
        self,
        python: str | Path,
        app: str,
        environment: Mapping[str, str],
        folder: Path,
        workers: Sequence[int] = (),
    ) -> None:
        self.workers = tuple(workers)
        self.folder = folder
        self._number = 0
        self._log = folder / "driver.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"{APPS}.driver", f"{APPS}.{app}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | environment,
            )

    def __enter__(self) -> Self:
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass

    def starts(self, n: int, pause: float) -> list[float]:
        """Return the seconds from each of `n` submissions to its body's first act, `pause` seconds apart."""
        found: list[float] = self._ask("starts", n=n, pause=pause)
        return found

    def commits(self, n: int, pause: float) -> list[float]:
        """Return the seconds from the commit of each of `n` submissions to its body's first act."""
        found: list[float] = self._ask("commits", n=n, pause=pause)
        return found

    def rate(self, n: int) -> float:
        """Return how many of `n` bodies, submitted at once, are performed per second."""
        return n / float(self._ask("bulk", n=n))

    def firsts(self, n: int, pause: float) -> list[float]:
        """Return the seconds from each of `n` submissions to the first event at a subscriber."""
        found: list[float] = self._ask("firsts", n=n, pause=pause)
        return found

    def death(self, number: int, timeout: float = 60.0) -> float | None:
        """Return the seconds from a body's death of this signal until the client knows; None: it never did."""
        found: float | None = self._ask("death", number=number, timeout=timeout)
        return found

    def _ask(self, do: str, **arguments: Any) -> Any:
        self._number += 1
        path = self.folder / f"stamps-{self._number}"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "path": str(path), **arguments}) + "\n")
        self._process.stdin.flush()
        try:
            return self._answer()
        finally:
            path.unlink(missing_ok=True)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        logs = [f"{log.name}: {log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log"))]
        raise RuntimeError("the submitter has gone\n" + "\n".join(logs))


#: Makes a contestant for as long as the block runs.
Maker = Callable[[], AbstractContextManager[Contestant]]


@contextmanager
def folder() -> Iterator[Path]:
    """Give a directory, removed afterwards; Unix sockets may lie in it."""
    path = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}peer-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def process(
    command: Sequence[str | Path], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server or a worker in a session of its own; ask it to leave, then end whatever is left of it."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
    try:
        yield running
    finally:
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


@contextmanager
def ours(
    runners: int = RUNNERS,
    *,
    app: str = "bulkhead",
    database: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Contestant]:
    """Have a tree of the tests' project with these settings, and a Django process that submits to it.

    `database` is the environment that names another one than a SQLite file, migrated.
    """
    overrides = {f"TASKKIT_{name}": json.dumps(value) for name, value in settings.items()}
    with Tree(runners=runners, env=overrides | dict(database or {})) as tree:
        # The courier has registered where to poke it; what comes earlier is found by polling.
        eventually(lambda: (tree.state_dir / "node").exists(), 10, "a node's name")
        if database is None:
            with closing(sqlite3.connect(f"file:{tree.database}?mode=ro", uri=True, timeout=5)) as file:
                eventually(lambda: file.execute("SELECT 1 FROM taskkit_node").fetchone(), 10, "a node's row")
        environment = tree.environment() | {
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            "BENCH_URL": tree.url,
            "BENCH_TOKEN": tree.token(ttl=3600),
            "BENCH_STORE": str(tree.state_dir / "store.sqlite3"),
        }
        with Contestant(sys.executable, app, environment, tree.state_dir, [tree.pid]) as contestant:
            contestant.starts(WARM_UP, 0.05)
            yield contestant
