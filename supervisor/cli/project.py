"""Which Django project is meant, where its tree keeps its state. Imports neither the project nor Django."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from taskkit import linux
from taskkit.errors import SettingsError
from taskkit.settings import default_state_dir

#: Settings module of the demo project that the wheel carries.
DEMO_SETTINGS: Final = "bulkhead_demo.settings"

#: Said wherever the demo is meant only because nothing else was named.
PRESUMED: Final = "the demo; name yours with --settings or DJANGO_SETTINGS_MODULE"

_SETTINGS_VARIABLE: Final = "DJANGO_SETTINGS_MODULE"
_STATE_DIR_VARIABLE: Final = "TASKKIT_STATE_DIR"

#: Where the demo's settings put its database.
DEMO_FOLDER_VARIABLE: Final = "BULKHEAD_DEMO_DIR"

#: Seconds for a project's settings to import. Django with a large project takes two or three.
_IMPORT_DEADLINE: Final = 30.0

#: Run in a process of its own, so that no project code is imported here. Settings modules may print: only the
#: last line of its output counts.
_ASK: Final = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
os.environ["DJANGO_SETTINGS_MODULE"] = sys.argv[2]
from taskkit.conf import read_settings
print("\\n" + json.dumps(read_settings()))
"""


def demo_folder() -> Path:
    """Return the folder of the demo project: beside the installed package, or in the checkout.

    Raises:
      SettingsError: it is in neither place; the installation is incomplete.
    """
    package = Path(linux.__file__).resolve().parent
    for folder in (package / "_demo", package.parent / "deploy" / "demo"):
        if (folder / "bulkhead_demo").is_dir():
            return folder
    raise SettingsError(
        "the demo project is missing from this installation; give your own project with --settings MODULE, "
        "or run: pip install --force-reinstall --no-deps django-bulkhead"
    )


@dataclass(frozen=True, slots=True)
class Project:
    """A Django project by its settings module; `path` has to be importable for it.

    Attributes:
      given: the user named it; otherwise it is the demo, by default.
    """

    settings_module: str
    path: tuple[str, ...]
    demo: bool
    given: bool

    @classmethod
    def choose(cls, settings: str | None) -> Project:
        """Return the project of the flag, else of DJANGO_SETTINGS_MODULE, else the demo."""
        module = settings or os.environ.get(_SETTINGS_VARIABLE) or DEMO_SETTINGS
        given = bool(settings or os.environ.get(_SETTINGS_VARIABLE))
        demo = module == DEMO_SETTINGS
        # The working directory, as for manage.py; the demo's own folder stands before it.
        path = (str(demo_folder()), os.getcwd()) if demo else (os.getcwd(),)
        return cls(module, path, demo, given)

    def read_settings(self) -> dict[str, Any]:
        """Return the project's settings as plain data, asked of a process that imports them.

        Raises:
          SettingsError: they cannot be imported, or are wrong; the message has the traceback's last line.
        """
        command = [sys.executable, "-c", _ASK, json.dumps(self.path), self.settings_module]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_DEADLINE)
        except subprocess.TimeoutExpired:
            raise SettingsError(
                f"the settings {self.settings_module} did not import within {_IMPORT_DEADLINE:.0f} s"
            ) from None
        if answer.returncode != 0:
            reason = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
            raise SettingsError(
                f"the settings {self.settings_module} cannot be read: {reason}; start from the folder of "
                "manage.py, or correct --settings or DJANGO_SETTINGS_MODULE"
            )
        found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
        return found


def names_state_dir(flag: Path | None) -> str | None:
    """Return the state directory that the user named, as an absolute path, by flag or environment."""
    given = flag or os.environ.get(_STATE_DIR_VARIABLE)
    return str(Path(given).expanduser().absolute()) if given else None


def is_presumed(project: Project, flag: Path | None) -> bool:
    """Whether nobody named a project or a state directory, so that the demo is meant by default."""
    return not project.given and names_state_dir(flag) is None


def flags_of(project: Project, flag: Path | None) -> str:
    """Return what has to follow a command, in whatever terminal, so that it finds the same tree."""
    words = ["--settings", project.settings_module] if project.given else []
    if named := names_state_dir(flag):
        words += ["--state-dir", named]
    return "".join(f" {shlex.quote(word)}" for word in words)


def place_demo_database(flag: Path | None) -> None:
    """Let the demo's database lie in the state directory, if one is named.

    Two trees must not share a database: the courier of one would take what was submitted to the other.
    """
    if named := names_state_dir(flag):
        os.environ.setdefault(DEMO_FOLDER_VARIABLE, named)


def control_socket(state_dir: Path) -> Path:
    """Return the path of the operator socket."""
    return state_dir / "control.sock"


def state_dir_for(project: Project, flag: Path | None, *, exactly: bool) -> Path:
    """Return the state directory of the project's tree: flag, TASKKIT_STATE_DIR, settings, default.

    Args:
      exactly: a tree is to be started, so the project's settings must be asked. Otherwise the default
        directory is taken without asking (which takes half a second) if a tree has its socket there.

    Raises:
      SettingsError: the settings had to be asked and cannot be read.
    """
    if named := names_state_dir(flag):
        return Path(named)
    usual = default_state_dir(project.settings_module, os.environ)
    if not project.given or (not exactly and control_socket(usual).exists()):
        return usual
    configured = project.read_settings().get("STATE_DIR")
    return Path(configured).expanduser().absolute() if configured else usual
