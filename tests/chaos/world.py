"""The tree under attack, started again when its supervisor dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
from pathlib import Path
from typing import Final

import trio

from taskkit import linux
from tests.chaos.disk import Disk
from tests.chaos.history import History
from tests.helpers import FOLDER_PREFIX, Tree, migrated_database
from tests.processes import opened

#: Bytes of the small disk. A run leaves about 40 KB, a large one 600 KB.
DISK: Final = 1024 * 1024 * 1024

#: Short waits, so that a minute holds many deaths; still a gateway that dies too often ends the tree with exit 4.
LIMITS: Final = {
    "cancel_grace_seconds": 1.0,
    "kill_grace_seconds": 0.5,
    "stop_grace_seconds": 3.0,
    "gateway_beat_seconds": 5.0,
    "gateway_restarts": 40,
    "restart_delay_seconds": 0.3,
    "streams_per_token": 1_000,  # all clients have one
}

#: A task that is held back is tried again soon, or nothing would come to rest; retention looks often.
_SETTINGS: Final = {
    "TASKKIT_LIMITS": LIMITS,
    "TASKKIT_BREAKER": {"pause": 0.5, "longest_pause": 2.0},
    "TASKKIT_RETENTION": {"every_seconds": 1.0},
}

#: Seconds for a tree to become READY while it is attacked at the same time.
_READY_SECONDS: Final = 60.0

#: Exit codes that the attack explains: SIGKILL, and giving up on a gateway that is killed too often.
_EXPLAINED: Final = (-signal.SIGKILL, 4)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class World:
    """State directory, database, port, and the tree that uses them, over several lives.

    Attributes:
      tree: of the present life.
      up: whether it is READY.
      marks: tree marks of all lives.
      exits: exit codes of the lives before.
      failed_starts: one line for each start that did not become READY.
    """

    def __init__(self, history: History, runners: int) -> None:
        self._history = history
        self._runners = runners
        self.disk = Disk(DISK)
        self.outside = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
        self.notes = self.outside / "notes"
        self.log = self.outside / "tree.log"
        self.database = self.outside / "project.sqlite3"
        shutil.copyfile(migrated_database(), self.database)
        self.port = free_port()
        self.tree = self._new_tree()
        self.up = False
        self.stopping = False
        self.marks: set[str] = set()
        self.exits: list[int] = []
        self.failed_starts: list[str] = []

    @property
    def state_dir(self) -> Path:
        """Of the tree."""
        return self.disk.path

    def _new_tree(self) -> Tree:
        tree = Tree(
            self.disk.path,
            runners=self._runners,
            args=("--bind", f"127.0.0.1:{self.port}"),
            env={"BULKHEAD_CHAOS_NOTES": str(self.notes)}
            | {name: json.dumps(value) for name, value in _SETTINGS.items()},
            timeout=_READY_SECONDS,
        )
        # Outside of the disk that is made full: the harness's own records must not suffer from it, and Django's
        # database has faults of its own.
        tree.database, tree.log = self.database, self.log
        return tree

    # --- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start a tree; return when it is READY. Raises AssertionError when it does not become so."""
        tree = self.tree = self._new_tree()
        try:
            await trio.to_thread.run_sync(tree.start)
        except BaseException:
            await trio.to_thread.run_sync(self._bury, tree)
            raise
        with contextlib.suppress(OSError, ValueError, KeyError):
            self.marks.add(json.loads((self.state_dir / "lock").read_text())["mark"])
        self.up = True

    async def keep(self) -> None:
        """Start a new tree whenever the supervisor has gone, until cancelled."""
        while True:
            await trio.sleep(0.02)
            if self.stopping or (code := self.tree.process.poll()) is None:
                continue
            self.up = False
            self.exits.append(code)
            self._history.supervisor_deaths += 1
            if code not in _EXPLAINED:
                self._history.troubles.append(f"the supervisor left with exit code {code}")
            self._bury(self.tree)
            await self._start_again()

    async def _start_again(self) -> None:
        while not self.up:
            try:
                await self.start()
            except AssertionError:
                self._history.supervisor_deaths += 1
                code = self.tree.process.returncode
                if code != -signal.SIGKILL:
                    self.failed_starts.append(f"exit code {code}, {self._last_words()}")
                await trio.sleep(0.2)

    def _last_words(self) -> str:
        lines = [line for line in self.tree.tail(2_000).splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    @staticmethod
    def _bury(tree: Tree) -> None:
        """Forget a tree whose supervisor is dead or must be; what it left is the next supervisor's to end."""
        process = getattr(tree, "process", None)
        if process is not None:
            process.kill()
            process.wait()
        if tree in opened:
            opened.remove(tree)

    async def stop(self) -> int:
        """Stop the tree as an operator would; return its exit code. Raises AssertionError when it stays."""
        self.stopping = True
        try:
            return await trio.to_thread.run_sync(self.tree.stop, 40.0)
        finally:
            self._bury(self.tree)

    def close(self) -> None:
        """End whatever is left, remove everything."""
        self._bury(self.tree)
        for mark in self.marks:
            linux.kill_tree(mark)
        for pid in linux.children():  # orphans that no mark leads to are ours, as this process is a subreaper
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.disk.remove()
        shutil.rmtree(self.outside, ignore_errors=True)

    # --- processes -----------------------------------------------------------------------------------------

    def pids(self, role: str) -> list[int]:
        """Return the living processes of a role: "supervisor", "gateway", "zygote", "courier", "runner", "intake".

        By the kernel's word, as the supervisor may be stopped.
        """
        for supervisor in self.harness_children:
            if role == "supervisor":
                return [supervisor] if name_of(supervisor) else []
            return [pid for pid in children_of(supervisor) if name_of(pid).startswith(f"bh:{role}")]
        return []

    @property
    def harness_children(self) -> set[int]:
        """The supervisor's pid, if it has one yet: a child that is collected by `keep`."""
        process = getattr(self.tree, "process", None)
        return {process.pid} if process is not None else set()


def children_of(pid: int) -> list[int]:
    """Return the children of a process, zombies included; none of one that has gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def name_of(pid: int) -> str:
    """Return the short name that a process has given itself; empty for a zombie or one that has gone."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        name, _, rest = status.partition("(")[2].rpartition(")")
        if not rest.split()[0].startswith("Z"):
            return name
    return ""


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has open; 0 when that is not ours to know."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def query(database: Path, statement: str) -> list[tuple[object, ...]]:
    """Return the rows of a read-only look into an SQLite file."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        rows: list[tuple[object, ...]] = connection.execute(statement).fetchall()
        return rows
