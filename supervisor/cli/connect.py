"""From a state directory to a client of the gateway that runs there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from supervisor.cli import exits, operate
from supervisor.cli.project import Project, state_dir_for
from taskkit.errors import SupervisorError
from taskkit.wire.messages import Status

if TYPE_CHECKING:
    from taskkit.client import Client

_KEY_FILE_VARIABLE: Final = "TASKKIT_KEY_FILE"

#: Seconds that a token of the command line's own is valid: a stream ends with its token, and `follow` may run
#: for days. It is never stored, and whoever can read the key can make another one.
_OWN_TTL: Final = 7 * 86400.0


class NotRunning(SupervisorError):
    """No supervisor runs on this state directory; the message says how to start one."""

    exit_code = exits.FAILED


def key_file(project: Project, state_dir: Path) -> Path:
    """Return the file with the key of the tokens: environment, state directory, the project's KEY_FILE.

    The project is asked last, since that costs half a second, and only if it was named.
    """
    if given := os.environ.get(_KEY_FILE_VARIABLE):
        return Path(given).expanduser().absolute()
    usual = state_dir / "key"
    if usual.exists() or not project.given:
        return usual
    configured = project.read_settings().get("KEY_FILE")
    return Path(configured).expanduser().absolute() if configured else usual


def not_running(project: Project, state_dir: Path) -> NotRunning:
    """Return the error for a state directory without a tree."""
    flag = f" --settings {project.settings_module}" if project.given else ""
    return NotRunning(
        f"no tree runs on {state_dir}; start one: bulkhead start{flag} (or name its --state-dir)"
    )


def running(settings: str | None, flag: Path | None) -> tuple[Project, Path, Status]:
    """Return the project, the state directory of its running tree, its status.

    Raises:
      NotRunning: there is no tree.
    """
    project = Project.choose(settings)
    state_dir = state_dir_for(project, flag, exactly=False)
    operator = operate.connect(state_dir)
    if operator is None:
        raise not_running(project, state_dir)
    with operator:
        return project, state_dir, operator.ask("status")


def client_at(url: str, key: Path) -> Client:
    """Return a client that may do everything, with a token signed with the key in the file `key`."""
    from taskkit import tokens  # jwt and httpx: 0.15 s that `--help`, `status` and `stop` do not need
    from taskkit.client import get_client

    token = tokens.issue(
        tokens.load_or_create_key(key),
        actions=tokens.ACTIONS,
        runs="*",
        tasks=("*",),
        ttl=_OWN_TTL,
        subject="bulkhead-cli",
    )
    return get_client(url, token=token)


def connected(settings: str | None, flag: Path | None) -> Client:
    """Return a client of the running tree.

    Raises:
      NotRunning: there is none.
    """
    project, state_dir, status = running(settings, flag)
    return client_at(status.url, key_file(project, state_dir))
