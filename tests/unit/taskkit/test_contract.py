"""The contract of Django's Tasks, by Django's own test runner, as the suite of a project that has moved to ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

#: Fewer were not found, or left out.
AT_LEAST = 30


def keep_contract(python: Path | str, database: Path) -> None:
    """Run `tests.interface.contract` with an interpreter's Django; see it pass."""
    tests = ["tests.interface", "--pattern", "contract.py", "--settings", "tests.interface.settings"]
    own = {"BULKHEAD_TEST_DB": str(database), "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [python, "-W", "error", "-m", "django", "test", *tests],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"} | own,
    )
    told = finished.stdout + finished.stderr
    assert finished.returncode == 0, told
    ran = re.search(r"Ran (\d+) tests", told)
    assert ran is not None, told
    assert int(ran[1]) >= AT_LEAST, told
    assert "skipped" not in told


def test_ours_keeps_the_contract_of_django_s_tasks(tmp_path: Path) -> None:
    keep_contract(sys.executable, tmp_path / "contract.sqlite3")
