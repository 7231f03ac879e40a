"""From a state directory to a client of the gateway that runs there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from supervisor.cli import exits, operate
from supervisor.cli.output import print_error
from supervisor.cli.project import PRESUMED, Project, flags_of, is_presumed, state_dir_for
from taskkit.errors import SupervisorError

if TYPE_CHECKING:
    from taskkit.client import Client

#: Seconds for which a follower waits for a tree that is gone: `bulkhead restart` takes two or three.
TREE_PATIENCE: Final = 5.0

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


def choose(settings: str | None, flag: Path | None) -> Project:
    """Return the project that is meant; say so when it is the demo's, though another one lies here."""
    project = Project.choose(settings)
    if is_presumed(project, flag) and Path("manage.py").exists():
        print_error(f"manage.py is here, but no settings are named: this is about another tree ({PRESUMED})")
    return project


def not_running(project: Project, state_dir: Path, flag: Path | None = None) -> NotRunning:
    """Return the error for a state directory without a tree, or whose tree cannot be reached."""
    from supervisor import state  # 0.2 s that only this error needs

    if (pid := state.holder_of(state_dir)) is not None:
        who = f"pid {pid}" if pid else "its pid is not known: see `pgrep -f bulkhead`"
        return NotRunning(
            f"a supervisor runs on {state_dir} ({who}), but its control.sock is gone: it is starting or stopping "
            f"(try again), or somebody has removed the file (`kill {pid or 'PID'}` stops it)"
        )
    presumed = f" ({PRESUMED})" if is_presumed(project, flag) else ""
    return NotRunning(
        f"no tree runs on {state_dir}{presumed}; start one: bulkhead start{flags_of(project, flag)} "
        "(or name its --state-dir)"
    )


class Tree:
    """A tree that has been found running.

    Attributes:
      flags: what has to follow a command so that it finds this tree.
    """

    def __init__(self, settings: str | None, flag: Path | None) -> None:
        """Find it.

        Raises:
          NotRunning: there is none.
        """
        project = choose(settings, flag)
        self.state_dir = state_dir_for(project, flag, exactly=False)
        self.flags = flags_of(project, flag)
        operator = operate.connect(self.state_dir)
        if operator is None:
            raise not_running(project, self.state_dir, flag)
        with operator:
            status = operator.ask("status")
        self.client = client_at(status.url, key_file(project, self.state_dir))


class Search:
    """Looks for the gateway of a tree while nothing answers at its address; called before each new try.

    Args:
      notice: is told once that the gateway is gone.
      remedy: how the error ends.
      clock: returns monotonic seconds.
    """

    def __init__(
        self,
        state_dir: Path,
        notice: Callable[[str], None],
        remedy: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state_dir = state_dir
        self._notice = notice
        self._remedy = remedy
        self._clock = clock
        self._said = False
        self._absent_since: float | None = None

    def found(self) -> None:
        """The gateway answers; the next outage is a new one."""
        self._said, self._absent_since = False, None

    def __call__(self) -> str | None:
        """Return the address that the tree has now, or None when it cannot tell.

        Raises:
          NotRunning: there has been no tree for longer than TREE_PATIENCE.
        """
        if not self._said:
            self._said = True
            self._notice("the gateway is gone; waiting for it (Ctrl-C leaves)")
        try:
            operator = operate.connect(self._state_dir)
            if operator is None:
                self._count_absence()
                return None
            self._absent_since = None
            with operator:
                return operator.ask("status").url
        except operate.Unresponsive:  # it starts, stops or is stuck: the follower's own patience decides
            return None

    def _count_absence(self) -> None:
        now = self._clock()
        if self._absent_since is None:
            self._absent_since = now
        if now - self._absent_since > TREE_PATIENCE:
            raise NotRunning(f"the tree on {self._state_dir} has stopped{self._remedy}")


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
    return Tree(settings, flag).client
