"""A tree whose named moments a test arms, over as many lives as it takes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from taskkit import failpoints, linux
from tests.chaos.world import children_of, free_port, name_of
from tests.helpers import FOLDER_PREFIX, ROOT, Tree, eventually, migrated_database
from tests.processes import kill, opened, processes_of, reap_children

#: Short waits, so that each recovery takes about a second; as many deaths as a test wants.
LIMITS: Final[Mapping[str, float]] = {
    "cancel_grace_seconds": 1.0,
    "kill_grace_seconds": 0.5,
    "stop_grace_seconds": 3.0,
    "gateway_beat_seconds": 1.0,
    "gateway_restarts": 1000,
    "restart_delay_seconds": 0.2,
}

#: Seconds for anything that takes one: a machine with two busy cores stretches it.
_PATIENCE: Final = 30.0


class Armed:
    """State directory, database, port, moments, with the tree that uses them; a context manager.

    Args:
      runners: of the default pool.
      limits: over LIMITS.
      env: over the environment of the tree.

    Attributes:
      port: of the gateway, in every life.
      notes: file in which chaos tasks note what they did.
      exits: exit codes of the supervisors that have left.
    """

    def __init__(
        self, *, runners: int = 4, limits: Mapping[str, float] = {}, env: Mapping[str, str] = {}
    ) -> None:
        self._runners = runners
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
        self.state_dir = self.folder / "state"
        self._points = self.folder / "points"
        for path in (self.state_dir, self._points):
            path.mkdir(mode=0o700)
        self.database = self.folder / "project.sqlite3"
        self.notes = self.folder / "notes"
        self.log = self.folder / "tree.log"
        shutil.copyfile(migrated_database(), self.database)
        self._env = {
            "BULKHEAD_CHAOS_NOTES": str(self.notes),
            "TASKKIT_LIMITS": json.dumps({**LIMITS, **limits}),
            failpoints.VARIABLE: str(self._points),
            **env,
        }
        self.port = free_port()
        self.exits: list[int] = []
        self._marks: set[str] = set()
        self.tree = self._new_tree()
        self.django = DjangoSide(self.tree.environment())

    def _new_tree(self) -> Tree:
        tree = Tree(
            self.state_dir,
            runners=self._runners,
            args=("--bind", f"127.0.0.1:{self.port}"),
            env=self._env,
            timeout=_PATIENCE,
        )
        tree.database, tree.log = self.database, self.log
        return tree

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        self.django.close()
        self._bury()
        for mark in self._marks:
            linux.kill_tree(mark)
        kill(processes_of(self.folder))
        reap_children()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _bury(self) -> None:
        """Forget a tree whose supervisor is dead or must be."""
        process = getattr(self.tree, "process", None)
        if process is not None:
            process.kill()
            process.wait()
        if self.tree in opened:
            opened.remove(self.tree)

    # --- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a tree; return when it is READY. Raises AssertionError when it does not become so."""
        self.tree.start()
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._marks.add(json.loads((self.state_dir / "lock").read_text())["mark"])

    def revive(self) -> bool:
        """Start another tree if the supervisor has left; return whether it had."""
        code = self.tree.process.poll()
        if code is None:
            return False
        self.exits.append(code)
        self._bury()
        self.tree = self._new_tree()
        self.start()
        reap_children()
        return True

    def move(self) -> None:
        """Let the next tree have another port, so that it does not have to wait for this one's."""
        self.port = free_port()

    def stop(self) -> int:
        """Stop the tree as an operator would; return its exit code."""
        return self.tree.stop(30.0)

    def pids(self, role: str) -> list[int]:
        """Return the living processes of a role, "supervisor" included; by the kernel's word."""
        supervisor = self.tree.process.pid
        if role == "supervisor":
            return [supervisor] if self.tree.process.poll() is None else []
        return [pid for pid in children_of(supervisor) if name_of(pid).startswith(f"bh:{role}")]

    def pid(self, role: str) -> int:
        """Return the one process of a role, waiting for it."""
        found = eventually(lambda: self.pids(role), _PATIENCE, f"a {role}")
        return found[0]

    # --- moments -------------------------------------------------------------------------------------------

    def arm(self, point: str, action: str) -> None:
        """Have the next process that passes `point` do `action`."""
        assert point in failpoints.POINTS, point
        self._acted_file(point).unlink(missing_ok=True)
        draft = self.folder / "draft"
        draft.write_text(action)
        draft.rename(self._points / point)

    def disarm(self, point: str) -> None:
        """Nothing happens at `point` any more."""
        (self._points / point).unlink(missing_ok=True)

    def acted(self, point: str) -> int:
        """Return the process that an armed moment has hit, or 0."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._acted_file(point).read_text())
        return 0

    def await_act(self, point: str, seconds: float = 15.0) -> int:
        """Return the process that an armed moment has hit, waiting for it."""
        return eventually(lambda: self.acted(point), seconds, f"somebody at {point}")

    def _acted_file(self, point: str) -> Path:
        return self._points / f"{point}{failpoints.ACTED}"


def signal_process(pid: int, number: signal.Signals) -> None:
    """Signal a process that may have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until_stopped(pid: int, seconds: float = 5.0) -> None:
    """Return when a process stands still, or is gone."""

    def stands() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
        except OSError:
            return True

    eventually(stands, seconds, f"pid {pid} stands still")


class DjangoSide:
    """A Django process of the project's own that submits; started when it is first asked.

    Args:
      environment: of the tree, so that it finds the same database.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, "DJANGO_SETTINGS_MODULE": "tests.project.settings"}
        self._process: subprocess.Popen[bytes] | None = None
        self._no = 0

    def submit(
        self, task: str, arguments: dict[str, Any], tag: str, *, commit: bool = True
    ) -> dict[str, Any]:
        """Have a submission made in a transaction; return `{run, outcome}`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.django_side"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env=self._environment,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._no += 1
        order = {"no": self._no, "task": task, "arguments": arguments, "tag": tag, "commit": commit}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        until = time.monotonic() + _PATIENCE
        readable = select.select([process.stdout], [], [], until - time.monotonic())[0]
        assert readable, "the submitting Django process does not answer"
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        assert answer["no"] == self._no
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
