"""A real tree to talk to, with bounded waits; the other helpers by one name."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import psutil

from taskkit import linux, seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import ChildStatus, Operation, Status
from tests.processes import (
    FOLDER_PREFIX,
    descendants,
    describe,
    in_open_tree,
    is_alive,
    kill,
    open_descriptors,
    open_trees,
    opened,
    processes_of,
    reap_children,
    socket_files,
    strays,
    wait_until_gone,
    wait_until_only,
)
from tests.streams import RawResponse, SseDecoder, SseEvent, collect, raw_get

__all__ = [
    "FOLDER_PREFIX",
    "ROOT",
    "TERMINAL",
    "RawResponse",
    "SseDecoder",
    "SseEvent",
    "Tree",
    "collect",
    "descendants",
    "describe",
    "eventually",
    "in_open_tree",
    "is_alive",
    "kill",
    "migrated_database",
    "open_descriptors",
    "open_trees",
    "processes_of",
    "raw_get",
    "reap_children",
    "socket_files",
    "strays",
    "wait_until_gone",
    "wait_until_only",
]

ROOT = Path(__file__).resolve().parent.parent
TERMINAL = ("SUCCESSFUL", "FAILED", "CANCELLED")

_T = TypeVar("_T")


def eventually(predicate: Callable[[], _T | None], timeout: float = 5.0, what: str = "") -> _T:
    """Return the first true value of `predicate`, asked every 10 ms.

    Raises:
      AssertionError: `timeout` seconds have passed; the message has the last value.
    """
    end = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() >= end:
            raise AssertionError(f"not within {timeout} s: {what or predicate}; last value {value!r}")
        time.sleep(0.01)
    return value


@functools.cache
def migrated_database() -> Path:
    """Return a migrated, empty SQLite file of tests.project to copy; made once per test process."""
    import atexit

    folder = tempfile.mkdtemp(prefix="bulkhead-db-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "template.sqlite3"
    subprocess.run(
        [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"],
        check=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ
        | {
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            "BULKHEAD_TEST_DB": str(path),
            "PYTHONPATH": str(ROOT),
        },
    )
    return path


#: Settings whose tables are those of the tests' own project.
MIGRATED = ("tests.project.settings", "tests.interface.settings")


class Tree:
    """A real `python -m supervisor run` with everything below it, as a context manager.

    Args:
      state_dir: an existing directory to use, left in place; by default a temporary one, removed at the end.
      settings: settings module, or None for the demo project.
      runners: runners of the default pool.
      args, env: further flags; environment over this process's.
      timeout: seconds until READY.

    Attributes:
      url: base URL of the gateway.
      pid: of the supervisor.
      log: file with its stdout and stderr.
      database: the project's SQLite file.
    """

    def __init__(
        self,
        state_dir: Path | None = None,
        *,
        settings: str | None = "tests.project.settings",
        runners: int = 2,
        args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._owned = state_dir is None
        self.state_dir = state_dir or Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
        self.database = self.state_dir / "project.sqlite3"
        self.log = self.state_dir / "tree.log"
        self.settings = settings
        self.runners = runners
        self.args = args
        self.env = dict(env or {})
        self.timeout = timeout
        self.url = ""
        self.process: subprocess.Popen[bytes]
        self._known: set[psutil.Process] = set()
        self._clients: list[httpx.Client] = []

    # -- life

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process.poll() is None:
                code = self.stop()
                assert failure or code == 0, f"exit code {code} after SIGTERM:\n{self.tail()}"
        finally:
            self._clean_up()

    def command(self) -> list[str]:
        """Return the command line, without the ready pipe."""
        return [
            *(sys.executable, "-m", "supervisor", "run", "--bind", "127.0.0.1:0"),
            *("--state-dir", str(self.state_dir), "--runners", str(self.runners)),
            *(("--settings", self.settings) if self.settings else ()),
            *self.args,
        ]

    def environment(self) -> dict[str, str]:
        """Return the environment of the tree, also for other commands that shall find it."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TASKKIT_") and name != "DJANGO_SETTINGS_MODULE"
        }
        return kept | {
            "BULKHEAD_TEST_DB": str(self.database),
            "BULKHEAD_DEMO_DIR": str(self.state_dir / "demo"),
            "PYTHONPATH": str(ROOT),
            **self.env,
        }

    def start(self) -> None:
        """Start it and wait until it is READY.

        Raises:
          AssertionError: it left, or was not ready in time; the message has its log.
        """
        if self.settings in MIGRATED and not self.database.exists():
            shutil.copyfile(migrated_database(), self.database)
        ready, writer = os.pipe()
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [*self.command(), "--ready-fd", str(writer)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writer],
                    cwd=ROOT,
                    env=self.environment(),
                    start_new_session=True,  # a Ctrl-C is for pytest, which then stops the tree
                )
            opened.append(self)
            os.close(writer)
            writer = -1
            poll = select.poll()  # select() ends at descriptor 1,023, and a harness may have more
            poll.register(ready, select.POLLIN)
            said = os.read(ready, 1) if poll.poll(self.timeout * 1000) else b""
        finally:
            os.close(ready)
            if writer >= 0:
                os.close(writer)
        assert said, f"not READY within {self.timeout} s, exit code {self.process.poll()}:\n{self.tail()}"
        self.url = self.status().url
        self.children()

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self.process.pid

    def tail(self, size: int = 8000) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def stop(self, timeout: float = 15.0) -> int:
        """Send SIGTERM; return the exit code.

        Raises:
          AssertionError: it did not leave in time. It is killed then.
        """
        self.children()
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            left = ", ".join(describe(process) for process in self.children())
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"still there {timeout} s after SIGTERM, with {left}:\n{self.tail()}"
            ) from None

    def _clean_up(self) -> None:
        for client in self._clients:
            client.close()
        if self in opened:
            self.children()
            opened.remove(self)
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        kill(self._known | processes_of(self.state_dir))
        wait_until_gone(self._known, 2.0)
        if self._owned:
            shutil.rmtree(self.state_dir, ignore_errors=True)

    # -- processes

    def children(self) -> list[psutil.Process]:
        """Return the living direct children of the supervisor."""
        try:
            found = psutil.Process(self.process.pid).children()
        except psutil.Error:
            return []
        self._known |= set(found)
        with contextlib.suppress(psutil.Error):
            self._known |= set(psutil.Process(self.process.pid).children(recursive=True))
        return [child for child in found if is_alive(child)]

    def operate(self, name: str, *, now: bool = False, timeout: float = 5.0) -> Status:
        """Ask the operator socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(timeout)
            with linux.short_socket_path(self.state_dir / "control.sock") as path:
                sock.connect(path)
            seqpacket.send(sock, codec.pack(Operation(name=name, now=now)))
            received = seqpacket.receive(sock)
        assert received is not None, f"the supervisor closed the operator socket:\n{self.tail()}"
        answer: Status = codec.unpack(received[0], Status)
        return answer

    def status(self) -> Status:
        """Return what the supervisor says about itself."""
        return self.operate("status")

    def child(self, name: str) -> ChildStatus:
        """Return the living child of that name or kind, waiting for it."""

        def find() -> ChildStatus | None:
            for child in self.status().children:
                if name in (child.name, child.kind) and child.pid and psutil.pid_exists(child.pid):
                    return child
            return None

        return eventually(find, 5.0, f"a child {name}")

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the supervisor or a child by name or kind; return the pid it went to."""
        self.children()
        pid = self.pid if name == "supervisor" else self.child(name).pid
        os.kill(pid, number)
        return pid

    # -- HTTP

    def token(self, **claims: Any) -> str:
        """Return a token, by default for everything; arguments as `taskkit.tokens.issue`."""
        from taskkit import tokens

        key = tokens.load_or_create_key(self.state_dir / "key")
        everything: dict[str, Any] = {"actions": sorted(tokens.ACTIONS), "tasks": ("*",), "ttl": 600}
        issued: str = tokens.issue(key, **({"subject": "tests"} | everything | claims))
        return issued

    def client(self, **claims: Any) -> httpx.Client:
        """Return an HTTP client with a token; closed with the tree."""
        headers = {"Authorization": f"Bearer {self.token(**claims)}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=10, trust_env=False)
        self._clients.append(client)
        return client

    @functools.cached_property
    def http(self) -> httpx.Client:
        """A client that may do everything."""
        return self.client()

    def submit(self, task: str, /, **kwargs: Any) -> dict[str, Any]:
        """Submit a function task; return the answer, which must be 202."""
        response = self.http.post("/api/v1/runs", json={"task": task, "kwargs": kwargs})
        assert response.status_code == 202, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def snapshot(self, run: str) -> dict[str, Any]:
        """Return the run as the API shows it."""
        response = self.http.get(f"/api/v1/runs/{run}")
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def wait(self, run: str, timeout: float = 10.0) -> dict[str, Any]:
        """Return the snapshot of a run once it has ended."""

        def ended() -> dict[str, Any] | None:
            snapshot = self.snapshot(run)
            return snapshot if snapshot["status"] in TERMINAL else None

        return eventually(ended, timeout, f"the end of run {run}")

    def stream(self, run: str, **options: Any) -> RawResponse:
        """Open the event stream of a run; options as `raw_get`."""
        headers = {"Accept": "text/event-stream"} | dict(options.pop("headers", {}))
        url = f"{self.url}/api/v1/runs/{run}/events{options.pop('query', '')}"
        return raw_get(url, token=options.pop("token", None) or self.token(), headers=headers, **options)

    def events(self, run: str, *, after: str = "", timeout: float = 30.0) -> list[SseEvent]:
        """Follow a run to its end; return its events."""
        return collect(f"{self.url}/api/v1/runs/{run}/events", self.token(), after=after, timeout=timeout)
