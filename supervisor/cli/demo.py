"""The command `demo`: a tree of its own in a temporary directory, one run, its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer

from supervisor import detach
from supervisor.cli import connect, exits, operate, runs
from supervisor.cli.options import Json, Pairs, parse_pairs
from supervisor.cli.project import DEMO_FOLDER_VARIABLE, DEMO_SETTINGS
from taskkit.errors import NeverReady
from taskkit.wire.messages import Status

_READY_DEADLINE: Final = 60.0
_STOP_DEADLINE: Final = 20.0


def _environment(folder: Path) -> dict[str, str]:
    """Return this environment without what would lead the demo's tree to another project or address."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("TASKKIT_") and k != "DJANGO_SETTINGS_MODULE"
    }
    return {**kept, DEMO_FOLDER_VARIABLE: str(folder)}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _own_tree() -> Iterator[tuple[Path, Status]]:
    """Yield directory and status of a fresh tree on a free port; at the end stop it and remove its files.

    Raises:
      NeverReady: it did not start; the message has its log.
    """
    signal.signal(signal.SIGTERM, _interrupt)  # so that TERM stops the tree, too
    folder = Path(tempfile.mkdtemp(prefix="bulkhead-demo-"))
    command = [
        *detach.COMMAND,
        "run",
        "--quiet",
        "--settings",
        DEMO_SETTINGS,
        "--bind",
        "127.0.0.1:0",
        "--state-dir",
        str(folder),
    ]
    try:
        log = folder / detach.LOG_NAME
        tree = detach.spawn(command, log, environment=_environment(folder), dies_with_caller=True)
        try:
            operator = operate.connect(folder) if tree.wait_ready(_READY_DEADLINE) else None
            if operator is None:
                raise NeverReady(f"the demo's tree did not start:\n{tree.last_words()}")
            with operator:
                status = operator.ask("status")
            yield folder, status
        finally:
            tree.end(_STOP_DEADLINE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _family(status: Status) -> str:
    """Return the tree's processes on one line, runners counted."""
    # Runners and intake have their pool in their kind: "runner (default)".
    services = [child for child in status.children if "(" not in child.kind]
    runners = [str(child.pid) for child in status.children if "(" in child.kind]
    parts = [f"supervisor {status.pid}", *(f"{child.name} {child.pid}" for child in services)]
    return " · ".join([*parts, f"runners {' '.join(runners)}"])


def demo(
    task: Annotated[str, typer.Argument(metavar="[TASK]", help="A task of the demo project.")] = "demo.audit",
    arguments: Pairs = None,
    json: Json = False,
) -> None:
    """Start a tree, perform one task of the demo, stop the tree; exit code by outcome."""
    values = parse_pairs(arguments)
    with _own_tree() as (folder, status):
        raise typer.Exit(_perform(folder, status, task, values, json=json))


def _perform(folder: Path, status: Status, task: str, values: dict[str, object], *, json: bool) -> int:
    from supervisor.cli.view import choose_view, was_successful

    client = connect.client_at(status.url, folder / "key")
    view = choose_view(task, json=json)
    try:
        view.notice(f"{status.url}  {_family(status)}")
        run = str(runs.submit_pairs(client, task, values)["id"])
        view.notice(f"run {run}")
        end = runs.watch(client, run, view)
        if not json:
            view.notice("Next: bulkhead run")
    except KeyboardInterrupt:
        view.notice("Interrupted; stopping the tree.")
        return exits.FAILED
    finally:
        client.close()
    return exits.OK if was_successful(end) else exits.FAILED
