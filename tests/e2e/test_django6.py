"""Django 6, which has the Tasks interface built in and wants Python 3.12: the contract, and a tree from end to end.

Each version is installed into an environment of its own, which is kept outside of the checkout.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.bench.peers.environments import python_of
from tests.helpers import ROOT
from tests.interpreters import at_least
from tests.unit.taskkit.test_contract import keep_contract

#: With what is performed of `test_backend.py`: everything on the newest, on the other what it has a way of its own for.
VERSIONS = {"6.0": ["-k", "page_enqueues or is_a_stream or attempts"], "6.1": []}

#: What the tests of a tree need beside what Bulkhead does, and its own installation.
TOOLS = ("pytest", "pytest-trio", "hypothesis", "hatchling")

INTERPRETER = at_least((3, 12))


def requirements(version: str) -> list[str]:
    """Return what Bulkhead needs, with this Django."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = [one for one in project["optional-dependencies"]["test"] if re.split(r"[^\w-]", one)[0] in TOOLS]
    return [*project["dependencies"], *tools, "editables", f"Django=={version}.*"]


@functools.cache
def python(version: str) -> Path:
    """Return an interpreter with this Django, and this checkout."""
    assert INTERPRETER is not None
    found = python_of(f"django-{version}", requirements(version), INTERPRETER)
    ours = [found, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT]
    subprocess.run(ours, check=True)
    return found


if INTERPRETER is None:

    def test_no_python_is_here_that_django_6_would_run_on(capsys: pytest.CaptureFixture[str]) -> None:
        with capsys.disabled():
            print("\nRECORD Django 6 was NOT tested: no python3.12, python3.13 or python3.14 is in PATH")

else:

    @pytest.mark.parametrize("version", VERSIONS)
    def test_ours_keeps_the_contract_of_django_s_tasks(version: str, tmp_path: Path) -> None:
        ask = [python(version), "-c", "import django, django.tasks; print(django.__version__)"]
        told = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        assert told.startswith(f"{version}.")
        keep_contract(python(version), tmp_path / "contract.sqlite3")

    @pytest.mark.parametrize("version", VERSIONS)
    def test_a_project_runs_on_it_from_end_to_end(version: str) -> None:
        """What `test_backend.py` sees on this interpreter: submissions, results, streams, signals of a real tree."""
        command = [
            python(version),
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/e2e/test_backend.py",
        ]
        finished = subprocess.run(
            [*command, "tests/e2e/test_backend.py"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
