"""A `manage.py` whose tree says that it is ready to the pipe that the tests give it."""

from __future__ import annotations

import os
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"
    at = sys.argv.index("--ready-fd")
    flag = sys.argv[at : at + 2]
    del sys.argv[at : at + 2]
    execve = os.execve

    def with_pipe(path: str, command: list[str], environment: dict[str, Any]) -> None:
        """Become the tree, with the one flag that is for tests."""
        execve(path, [*command, *flag], environment)

    os.execve = with_pipe  # type: ignore[assignment]
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
