"""Other interpreters of this machine, for what the present one cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

#: By what is the longest in use: the newest may lack wheels of what we need.
NAMES = ("python3.13", "python3.12", "python3.14")


def at_least(version: tuple[int, int]) -> str | None:
    """Return an interpreter of this version or a newer one that can make environments; this one, if it is."""
    if sys.version_info >= version:
        return sys.executable
    return next(filter(None, map(_working, NAMES)), None)


def _working(name: str) -> str | None:
    found = shutil.which(name)
    if found is None:
        return None
    # pyenv keeps those that are not selected behind a command which only says so.
    for selected in (None, *_pyenv_versions(name)):
        environment = os.environ | ({"PYENV_VERSION": selected} if selected else {})
        ask = [found, "-c", "import ensurepip, sys, venv; print(sys.executable)"]
        told = subprocess.run(ask, capture_output=True, text=True, check=False, env=environment)
        if told.returncode == 0:
            return told.stdout.strip()
    return None


def _pyenv_versions(name: str) -> list[str]:
    pyenv = shutil.which("pyenv")
    if pyenv is None:
        return []
    told = subprocess.run([pyenv, "whence", name], capture_output=True, text=True, check=False)
    return told.stdout.split()
