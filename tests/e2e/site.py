"""A Django project of its own, written for one test that changes its code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

_SETTINGS = """
import os
from pathlib import Path
SECRET_KEY = "for tests only"
USE_TZ = True
ALLOWED_HOSTS = ["localhost"]
INSTALLED_APPS = ["taskkit", "shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).parent / "site.sqlite3"}}
TASKKIT = {"LIMITS": {"cancel_grace_seconds": 1.0, "kill_grace_seconds": 0.5, "stop_grace_seconds": 3.0}}
"""

_TASKS = """
import time
import taskkit

VERSION = {version!r}

@taskkit.task
def version() -> str:
    return VERSION

@taskkit.task
def count(n: int, delay: float) -> str:
    for step in range(1, n + 1):
        taskkit.emit("progress", {{"step": step, "version": VERSION}})
        time.sleep(delay)
    return VERSION
"""


class Site:
    """A project in `folder`, with one app `shop` of two tasks that tell their code's version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "shop").mkdir()
        (folder / "shop" / "__init__.py").touch()
        (folder / "site_settings.py").write_text(_SETTINGS)
        self.write("one")
        command = [sys.executable, "-m", "django", "migrate", "--verbosity", "0"]
        environment = os.environ | self.environment | {"DJANGO_SETTINGS_MODULE": "site_settings"}
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=60)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a tree of this project needs."""
        # Without compiled files: two versions may be written within the second that their times are told by.
        return {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "PYTHONDONTWRITEBYTECODE": "1"}

    def write(self, version: str) -> None:
        """Put another version of the tasks in place."""
        (self.folder / "shop" / "tasks.py").write_text(_TASKS.format(version=version))

    def break_import(self) -> None:
        """Make the tasks impossible to import."""
        (self.folder / "shop" / "tasks.py").write_text("import a_module_that_is_missing\n")

    def append_settings(self, text: str) -> None:
        """Add lines to the settings module."""
        with (self.folder / "site_settings.py").open("a") as file:
            file.write(text)
