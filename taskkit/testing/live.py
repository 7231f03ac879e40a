"""A real tree beside a test, on the test's database."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from taskkit import outbox
from taskkit.models import Run

#: Module that a live tree has for settings: the project's, with the databases of the test.
_MODULE: Final = "bulkhead_live_settings"

#: Seconds until a live tree is ready, and until one that was asked to stop has left.
_READY: Final = 30.0
_LEAVE: Final = 20.0

#: What to do instead where nothing is ever committed.
_NOT_HERE: Final = (
    "take a TransactionTestCase (pytest: django_db(transaction=True)), or perform_submitted() without a tree"
)

#: Seconds between two looks of `wait_for_run`.
_LOOK: Final = 0.02


@dataclass(frozen=True, slots=True)
class LiveTree:
    """A running tree.

    Attributes:
      url: of its gateway.
      state_dir: its state directory; `tree.log` there is what it says.
    """

    url: str
    state_dir: Path

    def token(self, **claims: Any) -> str:
        """Return a token for its gateway; see `taskkit.tokens.issue`. Without claims it may do everything."""
        from taskkit import tokens

        given = claims or {"actions": tokens.ACTIONS, "runs": "*", "tasks": ("*",)}
        return tokens.issue(
            tokens.load_key(self.state_dir / "key"), **{"subject": "", "ttl": 3600.0, **given}
        )


@contextlib.contextmanager
def live_tree(*, runners: int = 2, environment: Mapping[str, str] | None = None) -> Iterator[LiveTree]:
    """Run supervisor, gateway and runners on the databases of this test until the block is left.

    They see what is committed only: use TransactionTestCase, or pytest-django's `transactional_db`. Code that was
    changed in the test's process (patches, overridden settings) is not changed there.

    Raises:
      ImproperlyConfigured: a database is in memory, where no other process can see it, or the test is within a
        transaction, as every TestCase is.
      RuntimeError: the tree was not ready in time; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="bh-live-", dir="/tmp") as folder:
        state_dir = Path(folder)
        (state_dir / f"{_MODULE}.py").write_text(_settings())
        process, url = _start(state_dir, runners, dict(environment or {}))
        try:
            yield LiveTree(url, state_dir)
        finally:
            _stop(process)


def wait_for_run(run: outbox.RunHandle | Run | str, timeout: float = 10.0) -> Run:
    """Return a run's row when it has ended, performed by a tree that runs beside the test.

    Raises:
      AssertionError: it has not within `timeout` seconds; the message says how far it is.
    """
    using = _database_of(run) or outbox.alias_of(None)
    id = run if isinstance(run, str) else str(run.id)
    deadline = time.monotonic() + timeout
    while True:
        found = Run.objects.using(using).filter(id=id).first()
        if found is not None and found.is_finished:
            return found
        if time.monotonic() > deadline:
            how = "is not in the database: was it rolled back?" if found is None else f"is {found.status}"
            why = "does a tree run with these settings?"
            if connections[using].in_atomic_block:
                why = f"no tree can see it within this test's transaction: {_NOT_HERE}"
            raise AssertionError(f"run {id} {how} after {timeout:g} s; {why}")
        time.sleep(_LOOK)


def _database_of(run: outbox.RunHandle | Run | str) -> str | None:
    if isinstance(run, outbox.RunHandle):
        return run.using
    return run._state.db if isinstance(run, Run) else None


def _settings() -> str:
    """Return the source of the tree's settings."""
    names = {alias: str(connections[alias].settings_dict["NAME"]) for alias in connections}
    for alias, name in names.items():
        if connections[alias].in_atomic_block:
            raise ImproperlyConfigured(
                f"this test is within a transaction of {alias!r}, which a live tree cannot see: {_NOT_HERE}"
            )
        if connections[alias].vendor == "sqlite" and (name == ":memory:" or "mode=memory" in name):
            raise ImproperlyConfigured(
                f"the test database {alias!r} is in memory, where a live tree cannot see it: give "
                f"DATABASES[{alias!r}]['TEST'] a NAME, which is a file"
            )
    return (
        f"from {settings.SETTINGS_MODULE} import *\n"
        f"from {settings.SETTINGS_MODULE} import DATABASES\n"
        f"names = {names!r}\n"
        "DATABASES = {alias: {**its, 'NAME': names[alias]} for alias, its in DATABASES.items() if alias in names}\n"
    )


def _start(state_dir: Path, runners: int, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    log = state_dir / "tree.log"
    ready, writer = os.pipe()
    command = [
        *(sys.executable, "-m", "supervisor", "run", "--settings", _MODULE, "--bind", "127.0.0.1:0"),
        *("--state-dir", str(state_dir), "--runners", str(runners), "--ready-fd", str(writer)),
    ]
    path = os.pathsep.join([str(state_dir), *(entry or os.getcwd() for entry in sys.path)])
    with os.fdopen(ready, "rb", buffering=0), contextlib.ExitStack() as undo:
        with os.fdopen(writer, "wb"), log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                env={**os.environ, **environment, "PYTHONPATH": path},
                start_new_session=True,
            )
        undo.callback(_stop, process)
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        said = os.read(ready, 1) if poll.poll(_READY * 1000) else b""
        words = log.read_text(errors="replace")
        url = next((word for word in words.split() if word.startswith("http://")), None)
        if not said or url is None:
            raise RuntimeError(f"the tree was not ready within {_READY:.0f} s:\n{words[-4000:]}")
        undo.pop_all()
    return process, url


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the tree; it takes its runners along, whatever they do."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
