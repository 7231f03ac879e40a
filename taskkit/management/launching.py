"""Becomes the command line's `bulkhead run` for this project: `manage.py` has named the settings already."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from django.conf import settings
from django.core.management import CommandError, CommandParser


def add_arguments(parser: CommandParser) -> None:
    """Add what every command that starts a tree has."""
    parser.add_argument("--state-dir", metavar="DIR", help="Where the tree keeps its state.")
    parser.add_argument("--runners", type=int, metavar="N", help="Runs at once in the pool 'default'.")


def become_tree(bind: str | None, uds: str | None, options: dict[str, Any]) -> NoReturn:
    """Replace this process by a tree in the foreground, until Ctrl-C or TERM.

    Raises:
      CommandError: the settings have no module that other processes could import.
    """
    module = getattr(settings, "SETTINGS_MODULE", None)
    if not module:
        raise CommandError("settings.configure() leaves nothing to import: a tree needs a settings module")
    command = [sys.executable, "-m", "supervisor", "run", "--settings", module]
    flags = {
        "--bind": bind,
        "--uds": uds,
        "--state-dir": options["state_dir"],
        "--runners": options["runners"],
    }
    for flag, value in flags.items():
        command += [] if value is None else [flag, str(value)]
    # Where manage.py lies, which need not be the working directory.
    path = [os.path.abspath(sys.path[0] or os.getcwd()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)
