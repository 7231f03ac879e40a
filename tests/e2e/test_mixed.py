"""PyPI's `supervisor` and `taskkit` share our import names: with either installed, `bulkhead` refuses."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOREIGN = ("supervisor", "taskkit")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, with an environment of its own."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=180, check=False
    )


def pip(venv: Path, *arguments: str | Path) -> None:
    """Have this interpreter's pip work on another environment."""
    python = venv / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, *arguments, "-q", cwd=venv)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    built = run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT), cwd=folder
    )
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An empty environment that borrows the dependencies of this one."""
    folder = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path).returncode == 0
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_mixed_environment_is_refused(foreign: str, first: str, wheel: Path, venv: Path) -> None:
    install = ("install", "--no-deps", "--no-compile")
    ours, theirs = (*install, wheel), (*install, foreign)
    for arguments in (ours, theirs) if first == "ours" else (theirs, ours):
        pip(venv, *arguments)
    refused = run(venv / "bin" / "bulkhead", "--help", cwd=venv)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert repr(foreign) in refused.stderr
    assert f"pip uninstall {foreign}" in refused.stderr
    assert "Traceback" not in refused.stderr

    pip(venv, "uninstall", "-y", foreign)  # the remedy, as it was printed
    pip(venv, *install, "--force-reinstall", wheel)
    assert run(venv / "bin" / "bulkhead", "--help", cwd=venv).returncode == 0
