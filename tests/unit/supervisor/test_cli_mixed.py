"""PyPI's `supervisor` and `taskkit` beside us, in either order, and what their removal leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor import mixed
from tests.helpers import ROOT

#: The console script, as pip writes it.
SCRIPT = "import sys; from gateway.command import main; sys.exit(main())"

PACKAGES = ("supervisor", "gateway", "taskkit")


def install_theirs(site: Path, name: str, *, metadata: str) -> None:
    """Write the files that pip would for another distribution with a package of ours, over what is there."""
    (site / name).mkdir(parents=True, exist_ok=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('theirs')\n" if name == "taskkit" else "")
    (site / name / "options.py").touch()
    info = site / f"{name}-4.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 4.3.0\n")
    text = (
        f"{name}\n"
        if metadata == "top_level.txt"
        else f"{name}/__init__.py,sha256=x,1\n{name}/options.py,,\n"
    )
    (info / metadata).write_text(text)


def install_ours(site: Path) -> None:
    """Copy our packages into a site directory, over what is there, as a wheel's installation does."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, site / name, dirs_exist_ok=True, ignore=skip)


def bulkhead(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `site` before everything else on the path, from a folder that has no package of ours."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    arguments = [sys.executable, *(command or ("-c", SCRIPT)), "--help"]
    return subprocess.run(arguments, env=environment, cwd="/", capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("metadata", ["top_level.txt", "RECORD"])
@pytest.mark.parametrize("name", ["supervisor", "taskkit"])
@pytest.mark.parametrize("order", ["theirs first", "ours first", "editable"])
def test_either_is_refused_in_any_order(tmp_path: Path, name: str, metadata: str, order: str) -> None:
    if order == "ours first":
        install_ours(tmp_path)
    install_theirs(tmp_path, name, metadata=metadata)
    if order == "theirs first":
        install_ours(tmp_path)
    done = bulkhead(tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"'{name}'" in done.stderr
    assert f"pip uninstall {name}" in done.stderr
    assert "Traceback" not in done.stderr
    if order != "editable":  # there, Python itself finds no `supervisor.__main__` in theirs
        assert bulkhead(tmp_path, "-m", "supervisor").returncode == 2


@pytest.mark.parametrize("name", ["supervisor", "taskkit"])
def test_files_that_their_removal_took_along_are_missed(tmp_path: Path, name: str) -> None:
    install_ours(tmp_path)
    (tmp_path / name / "__init__.py").unlink()
    done = bulkhead(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "--force-reinstall" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_supervisor_that_is_gone_is_named(tmp_path: Path) -> None:
    install_ours(tmp_path)
    shutil.rmtree(tmp_path / "supervisor")
    done = bulkhead(tmp_path)
    assert done.returncode == 2
    assert "supervisor/mixed.py is missing" in done.stderr


def test_an_environment_of_ours_alone_is_fine(tmp_path: Path) -> None:
    install_ours(tmp_path)
    assert bulkhead(tmp_path).returncode == 0
    assert mixed.problem() is None


def test_a_name_that_only_begins_like_ours_is_no_conflict(tmp_path: Path) -> None:
    install_theirs(tmp_path, "supervisor_quick", metadata="top_level.txt")
    install_theirs(tmp_path, "taskkit2", metadata="RECORD")
    assert bulkhead(tmp_path).returncode == 0
